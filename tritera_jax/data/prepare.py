# SPDX-License-Identifier: Apache-2.0
"""Text to a tokenizer and token shards.

The files of a corpus, in order, make units of work; a unit makes its own
shards of each split. What a unit has committed is recorded under progress/
after every shard, so that one that was killed goes on behind its last shard,
and hosts share the units without talking to each other. The bytes that come
out depend on the corpus and the arguments alone.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
import re
import time

import numpy as np
import tokenizers

from tritera_jax.data import documents, shards, storage
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.data.documents import File, Part
from tritera_jax.data.shards import Shard

SPLITS = ('train', 'validation')
_UNIT_BYTES = 2**26  # of files
_TOKENIZER_BYTES = 2**27  # of text, that a tokenizer is trained on
_BATCH_CHARACTERS = 2**22  # encoded at once, by all cores


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a dataset holds; printed by the command line.

  Attributes:
    folder: of the dataset.
    manifest: its manifest; None while other hosts have work to do.
    seconds: this call took: next to none if the dataset was there.
  """

  folder: str
  manifest: shards.Manifest | None
  seconds: float

  def __str__(self) -> str:
    if self.manifest is None:
      return (
        f'{self.folder}: the share of this host is done, '
        f'{self.seconds:.1f} s; the last host to finish writes the manifest'
      )
    lines = [f'{self.folder}: {self.manifest.vocab_size:,} tokens in the '
             f'vocabulary, {self.seconds:.1f} s']  # fmt: skip
    for split, entries in self.manifest.splits.items():
      ends, text, tokens = (
        sum(getattr(shard, field) for shard in entries)
        for field in ('documents', 'bytes', 'tokens')
      )
      lines.append(
        f'  {split:<10} {ends:,} documents, {text:,} bytes, '
        f'{tokens:,} tokens ({text / max(tokens, 1):.2f} bytes a token)'
      )
    if self.manifest.left_out:
      lines.append(
        f'  left out   {self.manifest.left_out:,} documents that are empty or '
        'not text'
      )
    return '\n'.join(lines)


def prepare(
  corpus: str,
  out: str,
  *,
  vocab_size: int = 4096,
  tokenizer: str | None = None,
  holdout: float = 0.05,
  text_field: str = 'text',
  shard_tokens: int = 2**26,
  host: int = 0,
  hosts: int = 1,
  progress: Callable[[int, int], None] | None = None,
) -> Summary:
  """Writes a dataset: token shards of a train and a validation split.

  Interrupted, it goes on where it was when run again; finished, it returns
  what is there. All cores encode. Several hosts that see the same corpus and
  the same `out` share the work, each with its own `host`.

  Args:
    corpus: a file, a folder, or 'stdlib': the source text of the Python
      standard library. A .jsonl(.gz, .zst) file is a document a line, a
      .parquet file one a row, any other file one document.
    out: dataset folder to write, or a bucket URL (gs://..., s3://...).
    vocab_size: most tokens of the tokenizer that is trained, on up to 128 MiB
      of the train split.
    tokenizer: a Hugging Face tokenizer.json to use instead of training one.
    holdout: share of documents in the validation split, chosen by a hash of
      their names; 0 for no such split.
    text_field: where a line's object or a row has its text.
    shard_tokens: tokens of a shard, about: it ends with the part of a document
      that fills it. Each split has as many in memory.
    host: which one this is, from 0.
    hosts: how many share the work.
    progress: called with the bytes of files done, and those of this host, once
      there is a tokenizer.

  Raises:
    FileNotFoundError: there is no such corpus or tokenizer.
    ValueError: a damaged file, no text in a split, or `out` holds another
      dataset.
    ModuleNotFoundError: .zst and .parquet files need the extra [data].
  """
  started = time.perf_counter()
  if not 0 <= host < hosts:
    raise ValueError(f'host={host} must lie in 0..hosts-1={hosts - 1}')
  if not 0 <= holdout < 1:
    raise ValueError(f'holdout={holdout} must lie in [0, 1)')
  if shard_tokens < 1:
    raise ValueError(f'shard_tokens={shard_tokens} must be >= 1')
  listing = documents.files(corpus)
  recipe = {
    'corpus': corpus,
    'files': documents.digest(listing),
    'holdout': float(holdout),  # 0 and 0.0 are one
    'text_field': text_field,
    'shard_tokens': shard_tokens,
  }
  if tokenizer is None:
    recipe['vocab_size'] = vocab_size
  else:
    given = tokenizer_lib.load_tokenizer(tokenizer)
    recipe['tokenizer'] = tokenizer_lib.fingerprint(given)
  if storage.read(out, 'manifest.json') is not None:
    manifest = shards.read_manifest(out)
    _check_recipe(out, manifest.recipe, recipe)
    storage.delete(out, 'progress/')  # a call that was killed just here
    return Summary(out, manifest, time.perf_counter() - started)

  if tokenizer is None:
    given = _trained(out, recipe, listing)
  else:
    storage.write(out, 'tokenizer.json', given.to_str(pretty=True).encode())
  encoder = _Encoder(given)
  units = [
    _Unit(out, number, files, recipe | {'tokenizer': encoder.fingerprint})
    for number, files in enumerate(_units(listing))
  ]
  mine = units[host::hosts]
  total = sum(unit.size for unit in mine)
  done = 0
  for unit in mine:
    unit.run(encoder, _offset(progress, done, total))
    done += unit.size
  return Summary(
    out,
    _finish(out, units, encoder, recipe),
    time.perf_counter() - started,
  )


def _offset(
  progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int], None]:
  return lambda done: progress(before + done, total) if progress else None


def _check_recipe(out: str, old: dict, new: dict):
  differing = [
    f'{name}: {old.get(name)!r} there, {new.get(name)!r} here'
    for name in sorted({*old, *new} - {'corpus'})
    if old.get(name) != new.get(name)
  ]
  if differing:
    raise ValueError(
      f'{out} holds another dataset ({"; ".join(differing)}); choose another '
      'folder, or delete this one'
    )


def _held_out(document: str, fraction: float) -> bool:
  """By a hash of the name: adding files moves no other document."""
  return _hashed(document) < fraction * 2**64


def _hashed(name: str) -> int:
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big')


def _units(listing: list[File]) -> Iterator[list[File]]:
  """Consecutive files of together about _UNIT_BYTES."""
  unit, size = [], 0
  for file in listing:
    unit.append(file)
    size += file.size
    if size >= _UNIT_BYTES:
      yield unit
      unit, size = [], 0
  if unit:
    yield unit


def _trained(
  out: str, recipe: dict, listing: list[File]
) -> tokenizers.Tokenizer:
  """The tokenizer of an interrupted call, or one trained now."""
  key = _key(recipe)
  if storage.read(out, 'progress/tokenizer') == key:
    return tokenizer_lib.load_tokenizer(f'{out}/tokenizer.json')
  trained = tokenizer_lib.train_tokenizer(
    _training_texts(listing, recipe), recipe['vocab_size']
  )
  storage.write(out, 'tokenizer.json', trained.to_str(pretty=True).encode())
  storage.write(out, 'progress/tokenizer', key)
  return trained


def _training_texts(listing: list[File], recipe: dict) -> Iterator[str]:
  """Text of the train split: all, or that of files chosen by a hash."""
  chosen, size = [], 0
  for file in sorted(listing, key=lambda file: _hashed(file.name)):
    if size < _TOKENIZER_BYTES:
      chosen.append(file)
      size += file.size
  left = _TOKENIZER_BYTES
  for file in sorted(chosen):
    # The same share of each file, so that none crowds out the others.
    share = math.ceil(left * file.size / size) if size else 0
    size -= file.size
    for part in documents.read(file, recipe['text_field']):
      if share <= 0:
        break
      if not _held_out(part.document, recipe['holdout']):
        yield part.text
        share -= len(part.text)
        left -= len(part.text)


def _key(values: dict) -> bytes:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest().encode()


class _Encoder:
  """Text to ids, on all cores, while the caller reads on."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self.fingerprint = tokenizer_lib.fingerprint(tokenizer)
    self.end_of_text = tokenizer_lib.end_of_text_id(tokenizer)
    # Not get_vocab_size(): a tokenizer of others may have holes in its ids.
    self.vocab_size = 1 + max(tokenizer.get_vocab().values())
    self.dtype = shards.token_dtype(self.vocab_size)
    # The end-of-text token spelled out in a text is text: it must not end
    # the document.
    tokenizer.encode_special_tokens = True
    self._encode = functools.partial(
      tokenizer.encode_batch_fast, add_special_tokens=False
    )

  def encode(self, parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part with its ids, the end of text included."""
    # A thread: the library lets go of Python's lock, and has its own threads.
    with futures.ThreadPoolExecutor(1) as pool:
      waiting = collections.deque()
      for batch in _batches(parts):
        texts = [part.text for part in batch]
        waiting.append((batch, pool.submit(self._encode, texts)))
        if len(waiting) > 1:
          yield from self._ids(*waiting.popleft())
      for batch, future in waiting:
        yield from self._ids(batch, future)

  def _ids(self, batch, future):
    for part, encoding in zip(batch, future.result(), strict=True):
      ids = encoding.ids
      if part.ends:
        ids.append(self.end_of_text)
      yield part, np.array(ids, self.dtype)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
  batch, size = [], 0
  for part in parts:
    batch.append(part)
    size += 1 + len(part.text)
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  yield batch


class _Unit:
  """Files and the shards that they become.

  Attributes:
    size: bytes of the files.
    record: what is committed: {'key', 'done', 'left_out', 'parts': {split:
      number of parts in its shards}, 'shards': {split: [Shard, ...]}}.
  """

  def __init__(self, out: str, number: int, files: list[File], recipe: dict):
    self.out, self.number, self.files = out, number, files
    self.size = sum(file.size for file in files)
    self.recipe = recipe
    # The unit's own files, so that others may come and go.
    self.key = _key(
      {k: v for k, v in recipe.items() if k not in ('corpus', 'files')}
      | {'files': documents.digest(files)}
    ).decode()
    self.read()

  @property
  def _file(self) -> str:
    return f'progress/{self.number:05}.json'

  def read(self):
    """Fetches the record; an empty one if there is none of this work."""
    text = storage.read(self.out, self._file)
    self.record = json.loads(text) if text else {}
    if self.record.get('key') != self.key:
      self.record = {
        'key': self.key,
        'done': False,
        'left_out': 0,
        'parts': dict.fromkeys(SPLITS, 0),
        'shards': {split: [] for split in SPLITS},
      }

  def run(self, encoder: _Encoder, progress: Callable[[int], None]):
    """Does what is not done yet."""
    if self.record['done']:
      return
    skip = dict(self.record['parts'])
    waiting = {split: _Waiting() for split in SPLITS}
    self.record['left_out'] = 0
    for part, ids in encoder.encode(self._unwritten(skip, progress)):
      if not part.text:
        self.record['left_out'] += 1
        continue
      split = self._split(part)
      waiting[split].add(part, ids)
      if waiting[split].tokens >= self.recipe['shard_tokens']:
        self._commit(split, waiting[split])
        waiting[split] = _Waiting()
    for split in SPLITS:
      self._commit(split, waiting[split])
    self.record['done'] = True
    self._write()

  def _split(self, part: Part) -> str:
    return SPLITS[_held_out(part.document, self.recipe['holdout'])]

  def _unwritten(self, skip: dict[str, int], progress: Callable[[int], None]):
    """The parts behind the last shards of an interrupted call."""
    before = 0
    for file in self.files:
      for part in documents.read(file, self.recipe['text_field']):
        progress(before + part.offset)
        split = self._split(part)
        if part.text and skip[split]:
          skip[split] -= 1
        else:
          yield part
      before += file.size
      progress(before)

  def _commit(self, split: str, waiting: '_Waiting'):
    """First the shard, then the record that it is there."""
    written = self.record['shards'][split]
    if waiting.tokens:
      path = f'{split}/{self.number:05}-{len(written):03}'
      written.append(dataclasses.asdict(waiting.write(self.out, path)))
      self.record['parts'][split] += waiting.parts
      self._write()

  def _write(self):
    storage.write(self.out, self._file, json.dumps(self.record).encode())


class _Waiting:
  """Encoded parts that have no shard yet."""

  def __init__(self):
    self.parts = self.tokens = self.bytes = 0
    self._ids, self._ends = [], []

  def add(self, part: Part, ids: np.ndarray):
    self._ids.append(ids)
    self.parts += 1
    self.tokens += ids.size
    self.bytes += len(part.text.encode())
    if part.ends:
      self._ends.append(self.tokens)

  def write(self, out: str, path: str) -> Shard:
    return shards.write_shard(
      out,
      path,
      np.concatenate(self._ids),
      np.array(self._ends, np.uint64),
      self.bytes,
    )


def _finish(
  out: str, units: list[_Unit], encoder: _Encoder, recipe: dict
) -> shards.Manifest | None:
  """Writes the manifest if every unit of every host is done."""
  for unit in units:
    unit.read()
  if not all(unit.record['done'] for unit in units):
    # Or another host has just finished, and tidied up.
    there = storage.read(out, 'manifest.json') is not None
    return shards.read_manifest(out) if there else None
  splits = {
    split: [Shard(**s) for unit in units for s in unit.record['shards'][split]]
    for split in SPLITS
    if recipe['holdout'] or split == 'train'
  }
  for split, entries in splits.items():
    if not entries:
      raise ValueError(
        f'corpus {recipe["corpus"]}: no text in the {split} split of '
        f'{sum(len(unit.files) for unit in units)} files; change '
        f'holdout={recipe["holdout"]} (0 for no validation split), or give '
        'more documents'
      )
  manifest = shards.Manifest(
    tokenizer=encoder.fingerprint,
    vocab_size=encoder.vocab_size,
    end_of_text=encoder.end_of_text,
    dtype=encoder.dtype,
    splits=splits,
    recipe=recipe,
    left_out=sum(unit.record['left_out'] for unit in units),
  )
  _delete_leftovers(out, splits)
  shards.write_manifest(out, manifest)
  storage.delete(out, 'progress/')
  return manifest


def _delete_leftovers(out: str, splits: dict[str, list[Shard]]):
  """Deletes what interrupted calls with another corpus or recipe wrote."""
  kept = {shard.path for entries in splits.values() for shard in entries}
  found = set()
  for split in SPLITS:
    array = re.compile(rf'({split}/\d{{5,}}-\d{{3,}})\.(tokens|ends)\.zarr3/')
    matches = map(array.match, storage.names(out, f'{split}/'))
    found |= {match[0] for match in matches if match and match[1] not in kept}
  for folder in sorted(found):
    storage.delete(out, folder)


def decode_split(dataset: str | Path, split: str) -> bytes:
  """The text of a split, documents end to end: what byte counts refer to.

  Raises:
    FileNotFoundError: not a finished dataset.
    ValueError: no such split, or the dataset is damaged.
  """
  source = shards.open_split(dataset, split)
  tokenizer = shards.read_tokenizer(dataset)
  ids = source.read(0, source.tokens)
  return tokenizer.decode(
    ids[ids != source.manifest.end_of_text].tolist(),
    skip_special_tokens=False,
  ).encode()
