# SPDX-License-Identifier: Apache-2.0
"""Stops the bucket that a run reads from: the same run in the end?

  python tests/drills/stop_bucket.py --seconds 10

Trains on a dataset in a folder, undisturbed, and on the same in a bucket
(gs:// and s3://) whose server stops on the way: as a process that hangs
(SIGSTOP, then SIGCONT) and as one that is gone (SIGKILL, connections refused,
then started anew). Compares every loss and the digest of the stream of tokens
of every step. The server is `tests/data/bucket_server.py`, and moto's if that
is installed, which forgets its objects when it ends and so only hangs.
"""

import argparse
from collections.abc import Sequence
import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.data import bucket_server
from tests.data.bucket_server import Server
from tritera_jax.data import shards, tokenizer

TRITERA = str(Path(sys.executable).with_name('tritera'))
CASES = (
  ('ours', 's3', ('hangs', 'goes')),
  ('ours', 'gs', ('hangs', 'goes')),
  *([('moto', 's3', ['hangs'])] if bucket_server.MOTO else []),
)
EXPERIMENT = """
from tritera_jax.experiment import *
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import TriLMSchedule

def experiment():
  return Experiment(
    ModelConfig('ternary', vocab_size=512, layers=1, d_model=32, d_ff=64,
                heads=2, kv_heads=2, head_dim=16, context_length=32),
    DataConfig('unset', batch_size=8, sequence_length=32),
    OptimizerConfig(TriLMSchedule(2e-3, 1.3e-3, warmup_steps=20)),
    RunConfig('unset', steps={steps}, log_every=1, tensorboard=False),
  )
"""


def prepare(folder: Path, chunks: int):
  """Random tokens in three shards; a window in a thousand is read twice."""
  bpe = tokenizer.train_tokenizer(['some text'], 300)
  folder.mkdir(parents=True)
  bpe.save(str(folder / 'tokenizer.json'))
  tokens = np.random.default_rng(0).integers(
    0, 512, chunks * shards._CHUNK, np.uint16
  )
  entries = [
    shards.write_shard(folder, f'train/{i:05}-000', part, np.array([9]), 9)
    for i, part in enumerate(np.array_split(tokens, 3))
  ]
  shards.write_manifest(
    folder,
    shards.Manifest(
      tokenizer.fingerprint(bpe), 512, 0, 'uint16', {'train': entries}, {}
    ),
  )


def records(run: Path) -> list[dict]:
  """The lines of metrics.jsonl that are whole."""
  with contextlib.suppress(FileNotFoundError):
    lines = (run / 'metrics.jsonl').read_text().split('\n')
    return list(map(json.loads, lines[:-1]))
  return []


def outcome(run: Path) -> list[tuple]:
  return [(r['step'], r['loss'], r['tokens_digest']) for r in records(run)]


def train(experiment: Path, run: Path, data: str, **environment: str):
  """Starts `tritera train`, which writes RUN.log."""
  with run.with_suffix('.log').open('w') as log:
    return subprocess.Popen(
      [
        TRITERA, 'train', str(experiment), '--run.folder', str(run),
        '--data.path', data,
      ],
      stdout=log, stderr=log,
      env=os.environ | {'XLA_FLAGS': ''} | environment,
    )  # fmt: skip


def disturbed(
  experiment: Path, run: Path, data: str, server: Server,
  outages: Sequence[str], seconds: float,
) -> str:  # fmt: skip
  """Trains from a bucket, each outage 20 steps after the one before."""
  said = []
  variables = bucket_server.environment(server.url)
  process = train(experiment, run, data, **variables)

  def wait_for(step: int):
    while len(records(run)) < step and process.poll() is None:
      time.sleep(0.02)
    assert len(records(run)) >= step, run.with_suffix('.log').read_text()

  try:
    for how in outages:
      wait_for(len(records(run)) + 20)
      began, before = time.perf_counter(), len(records(run))
      server.outage(how, seconds)
      during = len(records(run))
      wait_for(during + 1)
      after = time.perf_counter() - began - seconds
      said.append(
        f'{how} {seconds:g} s after step {before}: {during - before} steps of '
        f'what was read ahead, the next {after:.1f} s after its return'
      )
    assert process.wait() == 0, run.with_suffix('.log').read_text()
  finally:
    process.kill()
    process.wait()
  return '; '.join(said)


def drill(
  folder: Path,
  seconds: float,
  cases: Sequence[tuple[str, str, Sequence[str]]],
  steps: int,
) -> str:
  """Returns what was seen; raises AssertionError if the runs differ.

  Args:
    folder: an empty one.
    seconds: of each outage.
    cases: server, 'moto' or 'ours'; scheme of the URL, 'gs' or 's3'; and the
      outages of a run, each 'hangs' or 'goes'.
    steps: of each run.
  """
  experiment = folder / 'experiment.py'
  experiment.write_text(EXPERIMENT.format(steps=steps))
  prepare(folder / 'bucket' / 'data', chunks=1000)
  calm = train(experiment, folder / 'calm', str(folder / 'bucket' / 'data'))
  assert calm.wait() == 0, (folder / 'calm.log').read_text()
  want = outcome(folder / 'calm')
  assert len(want) == steps
  said = []
  for kind, scheme, outages in cases:
    server = Server(
      folder / 'bucket', bucket_server.MOTO if kind == 'moto' else None
    )
    run = folder / f'{scheme}_{kind}'
    try:
      seen = disturbed(
        experiment, run, f'{scheme}://bucket/data', server, outages, seconds
      )
    finally:
      server.end()
    assert outcome(run) == want, f'{scheme}, {kind}: the runs differ'
    said.append(f'{scheme}, {kind}: {seen}')
  return '\n'.join([*said, f'{steps} losses and digests equal in each'])


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--steps', type=int, default=300)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    print(drill(Path(temporary), cases=CASES, **vars(options)))
