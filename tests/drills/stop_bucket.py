# SPDX-License-Identifier: Apache-2.0
"""Stops the bucket that a run reads from: the same run in the end?

  python tests/drills/stop_bucket.py --seconds 10

Trains on a dataset in a folder, undisturbed, and on the same in a bucket
(gs:// and s3://) whose server stops in the middle: as a process that hangs
(SIGSTOP, then SIGCONT) and as one that is gone (SIGKILL, connections refused,
then started anew). Compares every loss and the digest of the stream of tokens
of every step. With `--server moto`, the server is moto's (`moto_server`, of
PyPI's moto[server]), which speaks Amazon's protocol; it forgets its objects
when it is killed, so that it only hangs.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from urllib import error, parse, request

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.data import bucket_server
from tritera_jax.data import shards, tokenizer

TRITERA = str(Path(sys.executable).with_name('tritera'))
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


class Server:
  """A process on a port of its own that serves what lies in a folder."""

  def __init__(self, folder: Path, kind: str):
    self.folder, self.kind = folder, kind
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self.port = free.getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}'
    self.start()

  def start(self):
    own = [sys.executable, bucket_server.__file__, str(self.folder)]
    command = ['moto_server', '-p'] if self.kind == 'moto' else own
    self.process = subprocess.Popen(
      [*command, str(self.port)],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while True:
      try:
        self.ask('GET', '')
        break
      except error.HTTPError:
        break  # an answer too
      except OSError:
        assert self.process.poll() is None, 'the server does not start'
        time.sleep(0.05)
    if self.kind == 'moto':
      self.ask('PUT', 'bucket')
      for file in filter(Path.is_file, self.folder.rglob('*')):
        name = file.relative_to(self.folder).as_posix()
        self.ask('PUT', f'bucket/{parse.quote(name)}', file.read_bytes())

  def ask(self, method: str, path: str, data: bytes | None = None):
    request.urlopen(
      request.Request(f'{self.url}/{path}', data, method=method), timeout=10
    ).close()

  def outage(self, how: str, seconds: float):
    if how == 'hangs':
      self.process.send_signal(signal.SIGSTOP)
      time.sleep(seconds)
      self.process.send_signal(signal.SIGCONT)
    else:
      self.end()
      time.sleep(seconds)
      self.start()

  def end(self):
    self.process.kill()
    self.process.wait()


def records(run: Path) -> list[dict]:
  """The lines of metrics.jsonl that are whole."""
  with contextlib.suppress(FileNotFoundError):
    lines = (run / 'metrics.jsonl').read_text().split('\n')
    return list(map(json.loads, lines[:-1]))
  return []


def outcome(run: Path) -> list[tuple]:
  return [(r['step'], r['loss'], r['tokens_digest']) for r in records(run)]


def start(experiment: Path, run: Path, data: str, **environment: str):
  log = run.with_suffix('.log').open('w')
  return subprocess.Popen(
    [
      TRITERA, 'train', str(experiment), '--run.folder', str(run),
      '--data.path', data,
    ],
    stdout=log, stderr=log,
    env=os.environ | {'XLA_FLAGS': ''} | environment,
  )  # fmt: skip


def disturbed(
  experiment: Path, run: Path, data: str, server: Server, how: str,
  seconds: float,
) -> str:  # fmt: skip
  """Trains from a bucket with an outage after 20 steps."""
  process = start(
    experiment, run, data, **bucket_server.environment(server.url)
  )
  try:
    while len(records(run)) < 20:
      assert process.poll() is None, run.with_suffix('.log').read_text()
      time.sleep(0.02)
    began, before = time.perf_counter(), len(records(run))
    server.outage(how, seconds)
    during = len(records(run))
    while len(records(run)) == during and process.poll() is None:
      time.sleep(0.02)
    after = time.perf_counter() - began - seconds
    assert process.wait() == 0, run.with_suffix('.log').read_text()
  finally:
    process.kill()
  assert during < len(records(run)), 'the run did not wait for the server'
  return (
    f'{data.partition(":")[0]}, server {how} {seconds:g} s after step '
    f'{before}: {during - before} steps of what was read ahead, the next '
    f'{after:.1f} s after its return'
  )


def drill(
  folder: Path,
  seconds: float,
  cases: list[tuple[str, str]],
  steps: int,
  server: str = 'own',
) -> str:
  """Returns what was seen; raises AssertionError if the runs differ.

  Args:
    folder: an empty one.
    seconds: of each outage.
    cases: scheme of the bucket, 'gs' or 's3', and how its server stops,
      'hangs' or 'goes'.
    steps: of each run.
    server: 'own' or 'moto'.
  """
  experiment = folder / 'experiment.py'
  experiment.write_text(EXPERIMENT.format(steps=steps))
  prepare(folder / 'bucket' / 'data', chunks=1000)
  local = str(folder / 'bucket' / 'data')
  calm = start(experiment, folder / 'calm', local)
  assert calm.wait() == 0, (folder / 'calm.log').read_text()
  want = outcome(folder / 'calm')
  assert len(want) == steps
  said = []
  for scheme, how in cases:
    bucket, run = Server(folder / 'bucket', server), folder / f'{scheme}_{how}'
    try:
      said.append(
        disturbed(
          experiment, run, f'{scheme}://bucket/data', bucket, how, seconds
        )
      )
    finally:
      bucket.end()
    assert outcome(run) == want, f'{scheme}, {how}: the runs differ'
    shutil.rmtree(run)
  return '\n'.join([*said, f'{steps} losses and digests equal in each'])


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--seconds', type=float, default=10)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--server', choices=['own', 'moto'], default='own')
  options = parser.parse_args()
  cases = [('s3', 'hangs')]
  if options.server == 'own':
    cases += [('s3', 'goes'), ('gs', 'hangs'), ('gs', 'goes')]
  with tempfile.TemporaryDirectory() as temporary:
    print(drill(Path(temporary), cases=cases, **vars(options)))
