# SPDX-License-Identifier: Apache-2.0
"""`prepare` interrupted, shared by hosts, and over a corpus that changes."""

import itertools
import json
from pathlib import Path
import random

import pytest

from tritera_jax.data import (
  documents,
  prepare,
  shards,
  storage,
  tokenizer,
  units,
)

WORDS = (
  'one two three zwölf if else return 日本 x y z\n ( ) 17 \U0001f600'.split(' ')
)


def text(seed: int, words: int) -> str:
  return ' '.join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
  """Four units; documents of several parts, and one of several shards."""
  monkeypatch.setattr(units, '_UNIT_BYTES', 2500)
  monkeypatch.setattr(units, '_BATCH_CHARACTERS', 500)
  monkeypatch.setattr(documents, '_PART', 400)
  folder = tmp_path / 'corpus'
  folder.mkdir()
  rows = [{'text': text(i, 10 * (i % 30))} for i in range(40)]
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  for i in range(8):
    (folder / f'b{i}.txt').write_text(text(100 + i, 150))
  (folder / 'c_long.txt').write_text(text(200, 3000))
  (folder / 'd.bin').write_bytes(b'\xff')
  (folder / 'e.txt').write_text(text(300, 300))
  return folder


def call(corpus: Path, out: Path, **arguments) -> prepare.Summary:
  arguments = {
    'vocab_size': 300, 'holdout': 0.4, 'shard_tokens': 900, **arguments
  }  # fmt: skip
  return prepare.prepare(str(corpus), str(out), **arguments)


def contents(folder: Path) -> dict[str, bytes]:
  return {
    file.relative_to(folder).as_posix(): file.read_bytes()
    for file in folder.rglob('*')
    if file.is_file()
  }


def shard(name: str) -> str:
  """'train/00000-000' of a file of its arrays."""
  return name.split('.')[0]


def unit(name: str) -> int:
  return int(shard(name)[-9:-4])


def shards_of(files: dict[str, bytes]) -> int:
  return len({shard(name) for name in files if 'zarr3' in name})


@pytest.fixture
def calm(corpus, tmp_path) -> dict[str, bytes]:
  """The files of a call that nothing disturbs."""
  call(corpus, tmp_path / 'calm')
  found = contents(tmp_path / 'calm')
  units = {unit(name) for name in found if 'zarr3' in name}
  assert units == set(range(4))
  return found


class Stop(Exception):
  pass


def stop_at(monkeypatch, number: int):
  """The call of this number that writes raises, having written."""
  counter = itertools.count()

  def stopping(function):
    def wrapped(*arguments):
      result = function(*arguments)
      if next(counter) == number:
        raise Stop
      return result

    return wrapped

  monkeypatch.setattr(shards, 'write_shard', stopping(shards.write_shard))
  monkeypatch.setattr(storage, 'write', stopping(storage.write))


def test_interrupted_anywhere_it_ends_in_the_same_bytes(
  corpus, calm, tmp_path, monkeypatch
):
  for number in itertools.count():
    out = tmp_path / f'out{number}'
    with monkeypatch.context() as patch:
      stop_at(patch, number)
      try:
        call(corpus, out)
        break
      except Stop:
        pass
    call(corpus, out)
    assert contents(out) == calm, f'interrupted at write {number}'
  # Tokenizer and its record, a shard and its record, the end of each unit.
  assert number == 2 + 2 * shards_of(calm) + 4 + 1


def test_interrupted_at_every_write_it_still_comes_to_its_end(
  corpus, calm, tmp_path, monkeypatch
):
  calls = 0
  while not (tmp_path / 'out/manifest.json').exists():
    with monkeypatch.context() as patch:
      stop_at(patch, 1)
      try:
        call(corpus, tmp_path / 'out')
      except Stop:
        calls += 1
  call(corpus, tmp_path / 'out')
  assert calls > 10
  assert contents(tmp_path / 'out') == calm


def test_what_is_committed_is_not_encoded_again(
  corpus, calm, tmp_path, monkeypatch
):
  del calm
  encoded = []
  ids = units.Encoder._ids

  def counting(self, batch, future):
    for part, tokens in ids(self, batch, future):
      encoded.append(part)
      yield part, tokens

  monkeypatch.setattr(units.Encoder, '_ids', counting)
  call(corpus, tmp_path / 'whole')
  whole = [part for part in encoded if part.text]
  for number in (9, 17):
    out = tmp_path / f'out{number}'
    with monkeypatch.context() as patch, pytest.raises(Stop):
      stop_at(patch, number)
      call(corpus, out)
    records = [
      json.loads(file.read_text()) for file in out.glob('progress/*.json')
    ]
    committed = sum(
      shard['tokens']
      for record in records
      for entries in record['shards'].values()
      for shard in entries
    )
    manifest = shards.read_manifest(tmp_path / 'whole')
    tokens = sum(s.tokens for each in manifest.splits.values() for s in each)
    encoded.clear()
    call(corpus, out)
    again = [part for part in encoded if part.text]
    tok = tokenizer.load_tokenizer(out / 'tokenizer.json')
    count = sum(len(tok.encode(p.text).ids) + p.ends for p in again)
    assert 0 < committed == tokens - count
    assert len(again) == len(set(again)) and set(again) < set(whole)


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_hosts_share_the_work_in_any_order(corpus, calm, tmp_path, order):
  out = tmp_path / 'out'
  for host in order[:-1]:
    summary = call(corpus, out, host=host, hosts=3)
    assert summary.manifest is None
    assert 'the share of this host is done' in str(summary)
    assert not (out / 'manifest.json').exists()
  summary = call(corpus, out, host=order[-1], hosts=3)
  assert summary.manifest == shards.read_manifest(out)
  assert contents(out) == calm
  # One that comes late finds the dataset.
  late = call(corpus, out, host=order[0], hosts=3)
  assert late.manifest == summary.manifest and contents(out) == calm


def test_a_host_does_its_own_units_alone(corpus, calm, tmp_path):
  call(corpus, tmp_path / 'out', host=1, hosts=2)
  written = {name for name in contents(tmp_path / 'out') if 'zarr3' in name}
  assert written == {
    name for name in calm if 'zarr3' in name and unit(name) % 2
  }


def test_more_hosts_than_units_and_the_number_may_change(
  corpus, calm, tmp_path
):
  for host in (7, 3, 0):
    call(corpus, tmp_path / 'out', host=host, hosts=8)
  call(corpus, tmp_path / 'out')
  assert contents(tmp_path / 'out') == calm
  with pytest.raises(ValueError, match='host=2 must lie in 0..hosts-1=1'):
    call(corpus, tmp_path / 'x', host=2, hosts=2)


def test_a_file_that_changes_makes_its_own_unit_anew(
  corpus, calm, tmp_path, monkeypatch
):
  """With a tokenizer that is given; one that is trained would change too."""
  given = str(tmp_path / 'calm/tokenizer.json')
  out = tmp_path / 'out'
  with monkeypatch.context() as patch, pytest.raises(Stop):
    stop_at(patch, 2 * shards_of(calm) + 4)  # the manifest's is the next
    call(corpus, out, tokenizer=given)
  before = {
    name: (out / name).stat().st_mtime_ns
    for name in contents(out)
    if name.endswith('/c/0')
  }
  # Shorter by so much that the unit has fewer shards.
  (corpus / 'c_long.txt').write_text(text(200, 700))
  call(corpus, out, tokenizer=given)
  call(corpus, tmp_path / 'anew', tokenizer=given)
  assert contents(out) == contents(tmp_path / 'anew')
  same = {
    name
    for name, at in before.items()
    if (out / name).exists() and (out / name).stat().st_mtime_ns == at
  }
  redone = {unit(name) for name in before.keys() - same}
  assert len(redone) == 1
  assert not {name for name in same if unit(name) in redone}
