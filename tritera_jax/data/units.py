# SPDX-License-Identifier: Apache-2.0
"""Units of the work of preparing a dataset.

The files of a corpus, in order, make units; a unit makes its own shards of
each split. What a unit has committed is recorded under progress/ after every
shard, so that one that was killed goes on behind its last shard, and hosts
share the units without talking to each other.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import functools
import hashlib
import json

import numpy as np
import tokenizers

from tritera_jax.data import documents, shards, storage
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.data.documents import File, Part
from tritera_jax.data.shards import Shard

SPLITS = ('train', 'validation')
_UNIT_BYTES = 2**26  # of files
_BATCH_CHARACTERS = 2**22  # encoded at once, by all cores


def held_out(document: str, fraction: float) -> bool:
  """By a hash of the name: adding files moves no other document."""
  return hashed(document) < fraction * 2**64


def hashed(name: str) -> int:
  digest = hashlib.sha256(name.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:8], 'big')


def key(values: dict) -> bytes:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest().encode()


def group(listing: list[File]) -> Iterator[list[File]]:
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


class Encoder:
  """Text to ids, on all cores, while the caller reads on."""

  def __init__(self, tokenizer: tokenizers.Tokenizer, end_of_text: int):
    self.fingerprint = tokenizer_lib.fingerprint(tokenizer)
    self.end_of_text = end_of_text
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


class Unit:
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
    self.key = key(
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

  def run(self, encoder: Encoder, progress: Callable[[int], None]):
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
    return SPLITS[held_out(part.document, self.recipe['holdout'])]

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
