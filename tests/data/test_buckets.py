# SPDX-License-Identifier: Apache-2.0
"""Datasets in buckets, on a server that speaks Google's and Amazon's protocols.

Each program is a process of its own: TensorStore reads where the server is
once.
"""

import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
from urllib import parse

import pytest

from tests.data.bucket_server import MOTO, SILENCE, Bucket, Server, environment
from tritera_jax.data import prepare, shards

PREFIX = 'some data #1/100%'
# Retries as in use, but at once.
QUICK = """
import sys
from tritera_jax.data import prepare, shards, storage
storage._RETRIES |= {'initial_delay': '1ms', 'max_delay': '1ms'}
out = sys.argv[1]
"""
ARGUMENTS = {'vocab_size': 300, 'holdout': 0.5, 'shard_tokens': 300}
PREPARE = f'prepare.prepare(sys.argv[2], out, **{ARGUMENTS})'


def run(
  bucket: Bucket | Server, program: str, *arguments: object, **variables: str
):
  return subprocess.run(
    [sys.executable, '-c', QUICK + program, *map(str, arguments)],
    env={
      **os.environ, **environment(bucket.url), **variables,
      'PYTHONPATH': os.pathsep.join(p for p in sys.path if p),
    },
    capture_output=True, text=True, timeout=60,
  )  # fmt: skip


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp('corpus')
  for i in range(20):
    (folder / f'{i}.txt').write_text(f'Text {i}: {"ten words " * 40}\n')
  return folder


@pytest.fixture(scope='module')
def local(corpus, tmp_path_factory) -> Path:
  """The dataset, prepared in a folder."""
  folder = tmp_path_factory.mktemp('local')
  prepare.prepare(str(corpus), str(folder), **ARGUMENTS)
  return folder


@pytest.fixture(params=['gs', 's3'])
def url(request) -> str:
  return f'{request.param}://bucket/{PREFIX}'


@pytest.fixture
def bucket():
  with Bucket() as bucket:
    yield bucket


def objects(local: Path) -> dict[str, bytes]:
  """The files of a folder under the names that they have in a bucket."""
  return {
    f'{PREFIX}/{file.relative_to(local)}': file.read_bytes()
    for file in local.rglob('*')
    if file.is_file()
  }


def test_a_dataset_in_a_bucket_is_that_of_a_folder(bucket, local, corpus, url):
  bucket.objects['beside'] = bucket.objects[f'{PREFIX}-'] = b'kept'
  done = run(bucket, PREPARE, url, corpus)
  assert done.returncode == 0, done.stderr
  kept = {'beside': b'kept', f'{PREFIX}-': b'kept'}
  assert len(objects(local)) > 10
  assert bucket.objects == objects(local) | kept

  sent = len(bucket.requests)
  program = """
for split in ('train', 'validation'):
  source = shards.open_split(out, split)
  source.verify()
  print(*source.read(0, source.tokens))
  print(prepare.decode_split(out, split) == prepare.decode_split(sys.argv[2],
                                                                 split))
"""
  remote = run(bucket, program, url, local)
  assert remote.returncode == 0, remote.stderr
  assert remote.stdout == run(bucket, program, local, local).stdout
  assert remote.stdout.count('True') == 2
  assert {method for method, _ in bucket.requests[sent:]} <= {'GET', 'HEAD'}


def test_again_it_finds_what_is_in_the_bucket(bucket, corpus, url):
  assert run(bucket, PREPARE, url, corpus).returncode == 0
  before, sent = dict(bucket.objects), len(bucket.requests)
  assert run(bucket, PREPARE, url, corpus).returncode == 0
  assert bucket.objects == before
  methods = {method for method, _ in bucket.requests[sent:]}
  assert not methods & {'PUT', 'POST', 'DELETE'}


def test_what_was_interrupted_goes_on_in_the_bucket(bucket, local, corpus, url):
  killed = run(
    bucket,
    f"""
import os
write, count = shards.write_shard, iter(range(100))
prepare.shards.write_shard = lambda *a: os._exit(9) if next(count) == 2 else (
  write(*a))
{PREPARE}
""",
    url,
    corpus,
  )
  assert killed.returncode == 9
  record = json.loads(bucket.objects[f'{PREFIX}/progress/00000.json'])
  [path] = [s['path'] for each in record['shards'].values() for s in each][1:]
  sent = len(bucket.requests)
  assert run(bucket, PREPARE, url, corpus).returncode == 0
  assert bucket.objects == objects(local)
  assert not [
    asked for method, asked in bucket.requests[sent:]
    if method in ('PUT', 'POST') and path in parse.unquote(asked)
  ]  # fmt: skip


@pytest.mark.parametrize('status', [403, 500])
def test_a_server_that_refuses_is_named_with_its_reason(
  bucket, local, corpus, url, status
):
  bucket.refusals = itertools.repeat(status)
  program = f"""
import numpy as np
manifest = shards.read_manifest(sys.argv[3])
for call in (
  lambda: shards.open_split(out, 'train'),
  lambda: shards.TokenSource(out, manifest, 'train').read(0, 1),
  lambda: {PREPARE},
  lambda: storage.write(out, 'x', b''),
  lambda: shards.write_shard(out, 'x', np.zeros(3, 'u2'), np.zeros(1, 'u8'), 1),
):
  try:
    print(call())
  except OSError as error:
    print(error)
"""
  done = run(bucket, program, url, corpus, local)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 5
  for line in lines:
    assert line.startswith(f'{url}/'), line
    assert f"[http_response_code='{status}']" in line
    assert 'damaged' not in line and 'tensorstore_spec' not in line
  # What may pass is asked again, ten times and not for ever. A call may ask
  # for the bucket itself before what is in it.
  tries = 11 if status >= 500 else 1
  assert 5 * tries <= len(bucket.requests) <= 10 * tries


def test_a_bucket_that_is_not_there_is_named(bucket, corpus, url):
  url = url.replace('bucket', 'nowhere')
  read = run(bucket, "shards.open_split(out, 'train')", url)
  assert f'FileNotFoundError: {url} has no manifest.json' in read.stderr
  written = run(bucket, PREPARE, url, corpus)
  assert f'OSError: {url}/tokenizer.json cannot be written' in written.stderr


def test_a_server_that_stumbles_is_asked_again(bucket, local, corpus, url):
  bucket.refusals = iter([503, 0, 500, 429, 0, 0, 503] * 5)
  done = run(bucket, PREPARE, url, corpus)
  assert done.returncode == 0, done.stderr
  assert bucket.objects == objects(local)


def test_a_request_that_is_never_answered_is_named_and_made_again(
  bucket, local, url
):
  bucket.objects |= objects(local)
  # The manifest is read before, of Amazon after a look at the bucket.
  before = {'gs': 2, 's3': 4}[url[:2]]
  bucket.refusals = iter([0] * before + [SILENCE])
  program = """
import threading, time
from tritera_jax.data import loader
source = shards.open_split(out, 'train')
reader = threading.Thread(target=lambda: print(*source.read(0, 50)))
reader.start()
longest = {}
while reader.is_alive():
  longest |= dict(loader.waiting([source]))
  time.sleep(0.02)
path = max(longest, key=longest.get)
print(path, longest[path] > 0.8)
"""
  done = run(bucket, program, url, TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS='1')
  assert done.returncode == 0, done.stderr
  tokens, named = done.stdout.splitlines()
  want = shards.open_split(local, 'train')
  assert tokens.split() == [str(token) for token in want.read(0, 50)]
  assert named == f'{url}/{want.shards[0].path}.tokens.zarr3 True'
  assert next(bucket.refusals, None) is None


@pytest.mark.skipif(not MOTO, reason="pip install 'tritera_jax[test]'")
def test_a_server_that_others_keep_agrees(local, corpus, tmp_path):
  """What ours answers is our reading of the protocol; moto's is not."""
  bucket = Server(tmp_path, MOTO)
  try:
    url = f's3://bucket/{PREFIX}'
    assert run(bucket, PREPARE, url, corpus).returncode == 0
    program = """
from pathlib import Path
there = sorted(storage.names(out, ''))
here = [p for p in Path(sys.argv[2]).rglob('*') if p.is_file()]
assert there == sorted(str(p.relative_to(sys.argv[2])) for p in here)
for name in there:
  assert storage.read(out, name) == (Path(sys.argv[2]) / name).read_bytes()
shards.open_split(out, 'train').verify()
storage.delete(out, 'train/')
print(len(there), storage.names(out, 'train/'))
"""
    done = run(bucket, program, url, local)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(objects(local))), '[]']
  finally:
    bucket.end()
