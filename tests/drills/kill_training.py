# SPDX-License-Identifier: Apache-2.0
"""Kills `tritera train` again and again: the same run to the bit?

  python tests/drills/kill_training.py --kills 50 --inside 15

Trains a small model on a mixture of two datasets with accumulated gradients,
undisturbed, and then with kill -9 at random moments, among them moments when
a checkpoint is being written, each time going on with the same command.
Compares the whole final state, the digest of the stream of tokens, and every
loss that was recorded.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

TRITERA = str(Path(sys.executable).with_name('tritera'))
EXPERIMENT = """
from tritera_jax.experiment import *
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import TriLMSchedule

def experiment():
  return Experiment(
    ModelConfig('ternary', vocab_size=1024, layers=2, d_model=256, d_ff=768,
                heads=2, kv_heads=2, head_dim=128, context_length=32),
    DataConfig('{folder}/a', batch_size=4, sequence_length=32,
               mixture=(('{folder}/a', 0.7), ('{folder}/b', 0.3))),
    OptimizerConfig(TriLMSchedule(2e-3, 1.3e-3, warmup_steps=20)),
    RunConfig('unset', steps={steps}, log_every=5, save_every=5,
              accumulation=2, evaluate_every=50, evaluate_tokens=256),
  )
"""


def prepare(folder: Path, steps: int) -> Path:
  library = Path(sysconfig.get_path('stdlib'))
  for name, corpus, more in (
    ('a', 'email', ['--vocab-size', '1024']),
    ('b', 'json', ['--tokenizer', str(folder / 'a' / 'tokenizer.json')]),
  ):
    subprocess.run(
      [
        TRITERA, 'prepare', str(library / corpus), str(folder / name),
        '--holdout', '0.3', *more,
      ],
      check=True, capture_output=True,
    )  # fmt: skip
  file = folder / 'experiment.py'
  file.write_text(EXPERIMENT.format(folder=folder, steps=steps))
  return file


def command(experiment: Path, run: Path) -> list[str]:
  return [TRITERA, 'train', str(experiment), '--run.folder', str(run)]


def outcome(run: Path) -> dict[str, str]:
  """Digests of the final state by leaf, and of the records."""
  import jax
  import numpy as np

  from tritera_jax.train import loop

  _, state = loop.restore_run(run)
  found = {
    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf)).hexdigest()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }
  for line in (run / 'metrics.jsonl').read_text().splitlines():
    record = json.loads(line)
    step = record['step']
    found[f'record {step}'] = (
      f'{record["loss"]!r} {record["tokens_digest"]} '
      f'{record.get("held_out_loss")!r}'
    )
  return found


def being_saved(run: Path, since: float) -> bool:
  """Whether a step is half written: not one of a process before `since`."""
  try:
    with os.scandir(run / 'checkpoints') as entries:
      return any(
        'tmp' in entry.name and entry.stat().st_ctime > since
        for entry in entries
      )
  except FileNotFoundError:
    return False


def wait_for_save(process: subprocess.Popen, run: Path, since: float):
  """Returns when a checkpoint begins to be written, or the process ends."""
  while process.poll() is None and not being_saved(run, since):
    time.sleep(0.001)


def drill(kills: int, inside: int, steps: int, seed: int, folder: Path) -> str:
  """Returns what was seen; raises AssertionError if the runs differ."""
  chance = random.Random(seed)
  experiment = prepare(folder, steps)
  started = time.perf_counter()
  subprocess.run(
    command(experiment, folder / 'calm'), check=True, capture_output=True
  )
  seconds = time.perf_counter() - started
  want = outcome(folder / 'calm')
  stormy = folder / 'stormy'
  killed = within = runs = 0
  log = folder / 'log'
  while killed < kills or within < inside or stormy.exists():
    calm = killed >= kills and within >= inside
    born = time.time()
    with log.open('w') as output:
      process = subprocess.Popen(
        command(experiment, stormy), stdout=output, stderr=output
      )
    try:
      if calm:
        process.wait()
      elif within < inside and killed % 2:
        wait_for_save(process, stormy, born)
        process.wait(chance.uniform(0, 0.05))
      else:
        process.wait(chance.uniform(0.1, 0.8) * seconds)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      killed += 1
      within += being_saved(stormy, born)
      continue
    assert process.returncode == 0, log.read_text()
    got = outcome(stormy)
    differing = sorted(k for k in want if got.get(k) != want[k])
    assert got == want, f'these differ: {differing}'
    runs += 1
    shutil.rmtree(stormy)
  return (
    f'{killed} kills, {within} inside a save, over {runs} runs of {steps} '
    f'steps: {len(want)} digests of leaves and records equal'
  )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--inside', type=int, default=15)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    print(drill(**vars(options), folder=Path(temporary)))
