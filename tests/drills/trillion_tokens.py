# SPDX-License-Identifier: Apache-2.0
"""1.2T tokens in 17,881 shards: opened, entered anywhere, resumed at the end.

  python tests/drills/trillion_tokens.py

The manifest is a real one; of the arrays only the chunks are written that the
steps looked at touch (a missing one is an error when it is read). A token
tells its position, so that what comes is checked against nothing that read
it. Then a run stands at the end of the first epoch, 73 million steps in, and
`tritera train` goes on from there, beside one that begins. Prints times and
the largest memory of each process.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
import random
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from tritera_jax.data import loader, shards, tokenizer
from tritera_jax.data.shards import Manifest, Shard, TokenSource

TRITERA = str(Path(sys.executable).with_name('tritera'))
TOKENS = 1_200_000_000_000
SHARD = 2**26  # as `tritera prepare` makes them, about
B, T = 64, 256
VOCABULARY = 6 * 256
EXPERIMENT = """
from tritera_jax.experiment import *
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import TriLMSchedule

def experiment():
  return Experiment(
    ModelConfig('ternary', vocab_size={vocabulary}, layers=1, d_model=32,
                d_ff=64, heads=2, kv_heads=2, head_dim=16, context_length={T}),
    DataConfig('{data}', batch_size={B}, sequence_length={T}),
    OptimizerConfig(TriLMSchedule(1e-2, 7e-3, warmup_steps=3)),
    RunConfig('unset', steps={steps}, log_every=1, save_every=1000,
              tensorboard=False),
  )
"""


def tokens_at(first: int, count: int) -> np.ndarray:
  """Position p as token p % 6: its byte of that number, and which it is."""
  place = np.arange(first, first + count)
  return (256 * (place % 6) + (place >> 8 * (place % 6)) % 256).astype(
    np.uint16
  )


def positions(tokens_BT: np.ndarray) -> list[int]:
  """Where each row lies; AssertionError if it is not one piece of the data."""
  found = []
  for row in tokens_BT:
    near = sum(int(token % 256) << 8 * int(token // 256) for token in row[:6])
    found += [
      p for p in range(near - 6, near + 7)
      if p >= 0 and np.array_equal(tokens_at(p, len(row)), row)
    ][:1]  # fmt: skip
  assert len(found) == len(tokens_BT), 'rows that are nowhere in the data'
  return found


def declare(folder: Path) -> TokenSource:
  """Writes tokenizer and manifest, and no token."""
  folder.mkdir()
  bpe = tokenizer.train_tokenizer(['some text'], 300)
  bpe.save(str(folder / 'tokenizer.json'))
  chance, entries, left = random.Random(0), [], TOKENS
  while left:
    size = min(left, SHARD + chance.randrange(2**12))
    path = f'train/{len(entries):05}-000'
    digest = hashlib.sha256(path.encode()).hexdigest()
    entries.append(Shard(path, size, size // 1000, 4 * size, digest))
    left -= size
  manifest = Manifest(
    tokenizer.fingerprint(bpe), VOCABULARY, 0, 'uint16', {'train': entries}, {}
  )
  shards.write_manifest(folder, manifest)
  return TokenSource(folder, manifest, 'train')


class Asked(TokenSource):
  """Notes what is read of it, and gives nothing."""

  def steps(self, start, stop):
    self.ranges.append((start, stop))
    yield None
    yield None
    yield np.zeros(stop - start, np.uint16)


def fill(source: TokenSource, steps: list[int]) -> int:
  """Writes the chunks that these steps touch; returns how many."""
  asked = Asked(source.root, source.manifest, 'train')
  asked.ranges = []
  batches = open_batches(asked)
  for step in steps:
    batches[step]
  wanted: dict[int, set[int]] = {}
  for start, stop in asked.ranges:
    for place in (start, stop - 1):
      index = int(np.searchsorted(source._starts, place, 'right')) - 1
      begin = int(source._starts[index])
      wanted.setdefault(index, set()).add((place - begin) // shards._CHUNK)
  for index, chunks in wanted.items():
    shard, begin = source.shards[index], int(source._starts[index])
    array = shards.create(
      source.root, f'{shard.path}.tokens.zarr3', shard.tokens, 'uint16'
    )
    for chunk in chunks:
      low = chunk * shards._CHUNK
      high = min(low + shards._CHUNK, shard.tokens)
      array[low:high].write(tokens_at(begin + low, high - low)).result()
  return sum(map(len, wanted.values()))


def open_batches(source: TokenSource, rows: slice = slice(None)):
  return loader.batches(
    [source], batch_size=B, sequence_length=T, seed=0, rows=rows
  )


def seek(folder: Path, steps: list[int]) -> str:
  """Opens the data and reads batches `steps`; what it took."""
  before = megabytes()
  started = time.perf_counter()
  source = shards.open_split(folder, 'train')
  batches = open_batches(source)
  opened = time.perf_counter() - started
  seconds, seen = [], []
  for step in steps:
    started = time.perf_counter()
    tokens_BT = batches[step]['tokens']
    seconds.append(time.perf_counter() - started)
    rows = positions(tokens_BT)
    assert all(p % T == 0 for p in rows), 'a row that is no window'
    halves = [
      open_batches(source, half)[step]['tokens']
      for half in (slice(0, B // 2), slice(B // 2, B))
    ]
    assert np.array_equal(np.concatenate(halves), tokens_BT)
    seen += [(step * B + i) // (TOKENS // T) for i in range(B)]
    seen[-B:] = zip(seen[-B:], rows, strict=True)
  assert len(set(seen)) == len(seen), 'a window twice in an epoch'
  return (
    f'{source.tokens:,} tokens in {len(source.shards):,} shards: opened in '
    f'{opened:.2f} s; {len(steps)} steps from {min(steps):,} to '
    f'{max(steps):,} read in {min(seconds):.3f} to {max(seconds):.3f} s '
    f'each, {B} rows; {megabytes():.0f} MB for the process, {before:.0f} '
    'before it opened'
  )


def megabytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(experiment: Path, run: Path) -> tuple[list[dict], float, float]:
  """The records of `tritera train`, its seconds and its megabytes."""
  log = run.with_suffix('.log')
  started = time.perf_counter()
  with log.open('w') as output:
    process = subprocess.Popen(
      [TRITERA, 'train', str(experiment), '--run.folder', str(run)],
      stdout=output, stderr=output, env=os.environ | {'XLA_FLAGS': ''},
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
  seconds = time.perf_counter() - started
  process.returncode = os.waitstatus_to_exitcode(status)
  assert process.returncode == 0, log.read_text()
  records = (run / 'metrics.jsonl').read_text().splitlines()
  return list(map(json.loads, records)), seconds, usage.ru_maxrss / 1024


def resume(folder: Path, source: TokenSource) -> str:
  """Trains 8 steps across the end of the first epoch, and the first 8."""
  from tritera_jax import experiment_file
  from tritera_jax.checkpoint import save
  from tritera_jax.train import step

  last = TOKENS // T // B + 4  # the epoch ends within step `last - 3`
  ahead = 24  # the loader reads on
  fill(source, [*range(8 + ahead), *range(last - 8, last + ahead)])
  said = []
  for first in (0, last - 8):
    file = folder / f'from_{first}.py'
    file.write_text(
      EXPERIMENT.format(
        vocabulary=VOCABULARY, B=B, T=T, data=source.root, steps=first + 8
      )
    )
    run = folder / f'run_{first}'
    if first:
      experiment = experiment_file.load(str(file))
      save.write_experiment(experiment, run)
      state = step.init_state(experiment)
      state = state._replace(step=state.step + first)
      with save.manager(run) as checkpoints:
        save.save(checkpoints, first, experiment.model, state)
        save.wait(checkpoints)
    records, seconds, memory = train(file, run)
    assert [r['tokens'] for r in records] == [
      B * T * (first + n) for n in range(1, 9)
    ]
    assert all(r['loss'] < 20 for r in records)
    said.append(
      f'8 steps from {B * T * first:,} tokens on: {seconds:.1f} s and '
      f'{memory:.0f} MB for the process'
    )
  return '\n'.join(said)


def drill(folder: Path, steps: int = 20) -> str:
  """Returns what was seen; raises AssertionError if a token is wrong."""
  chance = random.Random(1)
  end = TOKENS // T // B  # its last rows are of the second epoch
  wanted = [0, end, 2**31, *(chance.randrange(3 * end) for _ in range(steps))]
  chunks = fill(declare(folder / 'data'), wanted)
  said = subprocess.run(
    [sys.executable, __file__, '--seek', folder / 'data', *map(str, wanted)],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, sys.path))},
    stdout=subprocess.PIPE, text=True, check=True,
  ).stdout.strip()  # fmt: skip
  return f'{said}; {chunks:,} chunks written'


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--seek', nargs='+', help='a data folder and steps')
  options = parser.parse_args()
  if options.seek:
    print(seek(Path(options.seek[0]), list(map(int, options.seek[1:]))))
    raise SystemExit
  with tempfile.TemporaryDirectory() as temporary:
    here = Path(temporary)
    print(drill(here, options.steps))
    print(resume(here, declare(here / 'more')))
