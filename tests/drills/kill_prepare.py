# SPDX-License-Identifier: Apache-2.0
"""Kills `tritera prepare` again and again: the same dataset to the byte?

  python tests/drills/kill_prepare.py --kills 20

Prepares a folder of files of every kind, undisturbed, and then with kill -9
at random moments, each time going on with the same command. Compares every
file of the two datasets.
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

TRITERA = str(Path(sys.executable).with_name('tritera'))


def write_corpus(folder: Path, megabytes: float):
  """The standard library's text as .txt, .jsonl and .jsonl.gz files."""
  sources = sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py'))
  texts, size = [], 0
  for source in sources:
    if size > megabytes * 1e6:
      break
    texts.append(source.read_text('utf-8', errors='replace'))
    size += len(texts[-1])
  folder.mkdir()
  for i in range(0, len(texts), 40):
    lines = '\n'.join(json.dumps({'text': t}) for t in texts[i : i + 40])
    if i % 3 == 0:
      (folder / f'{i}.jsonl').write_text(lines)
    elif i % 3 == 1:
      (folder / f'{i}.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    else:
      (folder / f'{i}.txt').write_text('\n'.join(texts[i : i + 40]))


def command(corpus: Path, out: Path) -> list[str]:
  return [
    TRITERA, 'prepare', str(corpus), str(out), '--vocab-size', '2048',
    '--shard-tokens', '100000',
  ]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
  return {
    str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.rglob('*'))
    if file.is_file()
  }


def drill(kills: int, megabytes: float, seed: int, folder: Path) -> str:
  """Returns what was seen; raises AssertionError if the datasets differ."""
  chance = random.Random(seed)
  corpus, calm, stormy = folder / 'corpus', folder / 'calm', folder / 'stormy'
  write_corpus(corpus, megabytes)
  started = time.perf_counter()
  subprocess.run(command(corpus, calm), check=True, capture_output=True)
  seconds = time.perf_counter() - started
  killed = committed = 0
  while killed < kills:
    process = subprocess.Popen(
      command(corpus, stormy),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    try:
      process.wait(chance.uniform(0.3, 0.9) * seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      killed += 1
      committed += (stormy / 'progress').exists()
    else:
      # It finished first: begin anew with what kills are left.
      assert process.returncode == 0, 'prepare failed'
      assert contents(stormy) == contents(calm), 'the datasets differ'
      shutil.rmtree(stormy)
  subprocess.run(command(corpus, stormy), check=True, capture_output=True)
  want, got = contents(calm), contents(stormy)
  assert got == want, f'these differ: {sorted(want.items() ^ got.items())}'
  return (
    f'{killed} kills, {committed} with work recorded; '
    f'{len(want)} files equal to the byte'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--megabytes', type=float, default=20)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    print(drill(**vars(options), folder=Path(temporary)))
