# SPDX-License-Identifier: Apache-2.0
"""Token shards: TensorStore arrays under a manifest.

A dataset is a folder or bucket prefix:

  manifest.json                  written last: without it, unfinished
  tokenizer.json
  <split>/<shard>.tokens.zarr3   uint16 or uint32 [tokens]
  <split>/<shard>.ends.zarr3     uint64 [documents], exclusive end offsets

Every document ends with the tokenizer's end-of-text token, which its end
offset includes. A long document may go on in the next shard: it counts where
it ends.

An array lies in files of up to 2^24 elements (zarr3's sharding), read in
chunks of 2^14: few files, and a window costs 32 KiB of reading rather than a
file. Each chunk has a checksum, and all are stored: a damaged or missing one
is an error, never zeros.
"""

from collections.abc import Generator, Sequence
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
import time
from typing import Any, cast

from jaxtyping import Integer
import numpy as np
import pydantic
import tensorstore as ts
import tokenizers

from tritera_jax import validated
from tritera_jax.data import storage
from tritera_jax.data import tokenizer as tokenizer_lib

KIND, VERSION = 'tritera-tokens', 1
_FILE, _CHUNK = 2**24, 2**14  # elements
_CACHE_BYTES = 2**28
# Arrays of a source kept open: some 7 KB each. To open one anew takes 0.1 ms on
# a disk, of a bucket a request.
_OPEN = 4096
_CODECS = [
  {'name': 'bytes', 'configuration': {'endian': 'little'}},
  {'name': 'crc32c'},
]


@dataclasses.dataclass(frozen=True)
class Shard:
  """One pair of arrays. `path` is relative to the dataset, without ending.

  Attributes:
    path: such as 'train/00000-000'.
    tokens: length of the token array.
    documents: length of the ends array: those that end here.
    bytes: UTF-8 bytes of the documents, without the document ends.
    sha256: of the tokens as little-endian integers.
  """

  path: str
  tokens: int
  documents: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a dataset holds, and how it came to be.

  Attributes:
    tokenizer: fingerprint of tokenizer.json.
    vocab_size: every id is below it.
    end_of_text: id of the token that ends a document.
    dtype: of the token arrays.
    splits: shards of each split, in order.
    recipe: arguments that made it, to tell a finished dataset from another.
    left_out: documents that were empty or not text.
    kind, version: of this format.
  """

  tokenizer: str
  vocab_size: int
  end_of_text: int
  dtype: str
  splits: dict[str, list[Shard]]
  recipe: dict[str, Any]
  left_out: int = 0
  kind: str = KIND
  version: int = VERSION


_MANIFEST = pydantic.TypeAdapter(Manifest)


def _spec(root: str | Path, path: str) -> dict:
  return {'driver': 'zarr3', 'kvstore': storage.kvstore(root, f'{path}/')}


def token_dtype(vocab_size: int) -> str:
  """The smallest of uint16 and uint32 that holds every id."""
  return 'uint16' if vocab_size <= 2**16 else 'uint32'


def create(root: str | Path, path: str, tokens: int, dtype: str):
  """An array of the format, its chunks missing; its TensorStore."""
  size = max(1, tokens)
  chunk = min(_CHUNK, size)
  file = min(_FILE, -(-size // chunk) * chunk)
  sharding = {
    'name': 'sharding_indexed',
    'configuration': {
      'chunk_shape': [chunk],
      'codecs': _CODECS,
      'index_codecs': _CODECS,
    },
  }
  grid = {'name': 'regular', 'configuration': {'chunk_shape': [file]}}
  spec = _spec(root, path) | {
    'metadata': {'chunk_grid': grid, 'codecs': [sharding]},
    'store_data_equal_to_fill_value': True,
  }
  return ts.open(
    spec,
    create=True,
    delete_existing=True,
    dtype=dtype,
    shape=[tokens],
    context=storage.context(),
  ).result()


def _write_array(root: str | Path, path: str, array: np.ndarray):
  try:
    create(root, path, array.size, array.dtype.name).write(array).result()
  except ValueError as error:
    raise OSError(
      f'{root}/{path} cannot be written: {storage.reason(error)}'
    ) from None


def write_shard(
  root: str | Path,
  path: str,
  tokens: Integer[np.ndarray, ' tokens'],
  ends: Integer[np.ndarray, ' documents'],
  text_bytes: int,
) -> Shard:
  """Writes one shard's two arrays and returns its manifest entry."""
  _write_array(root, f'{path}.tokens.zarr3', tokens)
  _write_array(root, f'{path}.ends.zarr3', ends.astype(np.uint64))
  digest = hashlib.sha256(tokens.astype(tokens.dtype.newbyteorder('<')))
  return Shard(path, tokens.size, ends.size, text_bytes, digest.hexdigest())


def write_manifest(root: str | Path, manifest: Manifest):
  """Declares a dataset finished."""
  text = json.dumps(dataclasses.asdict(manifest), indent=2) + '\n'
  storage.write(root, 'manifest.json', text.encode())


def read_manifest(root: str | Path) -> Manifest:
  """Reads and checks a dataset's manifest.

  Raises:
    FileNotFoundError: no manifest: not a dataset, or an unfinished one.
    ValueError: a field is missing, unknown, of a wrong type or value.
  """
  file = f'{root}/manifest.json'
  text = storage.read(root, 'manifest.json')
  if text is None:
    raise FileNotFoundError(
      f'{root} has no manifest.json: not a dataset, or one whose `tritera '
      'prepare` did not finish; run that again'
    )
  manifest = validated.from_json(_MANIFEST, text, file)
  for field, wanted in (
    ('kind', KIND),
    ('version', VERSION),
    ('dtype', token_dtype(manifest.vocab_size)),
  ):
    if getattr(manifest, field) != wanted:
      raise ValueError(
        f'{file}: {field} is {getattr(manifest, field)!r}, wanted {wanted!r}'
      )
  if not 0 <= manifest.end_of_text < manifest.vocab_size:
    raise ValueError(
      f'{file}: end_of_text is {manifest.end_of_text}, wanted an id of the '
      f'vocabulary of {manifest.vocab_size}'
    )
  for split, shards in manifest.splits.items():
    for shard in shards:
      if '..' in Path(shard.path).parts or shard.path.startswith('/'):
        raise ValueError(f'{file}: {split}: path {shard.path!r} leaves the '
                         'dataset')  # fmt: skip
      if min(shard.tokens, shard.documents, shard.bytes) < 0:
        raise ValueError(f'{file}: {shard.path}: a count is negative')
  return manifest


def read_tokenizer(root: str | Path) -> tokenizers.Tokenizer:
  """The tokenizer that a dataset's tokens are of.

  Raises:
    FileNotFoundError: not a finished dataset, or its tokenizer is gone.
    ValueError: it is another one than the manifest's.
  """
  manifest = read_manifest(root)
  tokenizer = tokenizer_lib.load_tokenizer(f'{root}/tokenizer.json')
  found = tokenizer_lib.fingerprint(tokenizer)
  if found != manifest.tokenizer:
    raise ValueError(
      f'{root}/tokenizer.json is {found}, the manifest says '
      f'{manifest.tokenizer}; the dataset is damaged: prepare again'
    )
  return tokenizer


class TokenSource:
  """The tokens of a split, its shards end to end.

  Attributes:
    manifest: of the dataset.
    tokens, documents, bytes: of the split, as `Shard` counts them.
  """

  def __init__(self, root: str | Path, manifest: Manifest, split: str):
    shards = manifest.splits[split]
    self.root, self.manifest, self.shards = root, manifest, shards
    self.tokens = sum(shard.tokens for shard in shards)
    self.documents = sum(shard.documents for shard in shards)
    self.bytes = sum(shard.bytes for shard in shards)
    self._starts = np.cumsum([0] + [shard.tokens for shard in shards])
    self._context = storage.context(
      cache_pool={'total_bytes_limit': _CACHE_BYTES}
    )
    # Opened when first read: a large dataset has thousands, a bucket answers
    # slowly. Threads may open one twice, which is harmless.
    self._opened = functools.lru_cache(_OPEN)(self._open)
    # What is under way: (path of the shard, since when, its future).
    self._pending: dict[object, tuple[str, float, ts.Future]] = {}

  def _where(self, index: int) -> str:
    return f'{self.root}/{self.shards[index].path}.tokens.zarr3'

  def _open(self, index: int) -> ts.Future:
    spec = _spec(self.root, f'{self.shards[index].path}.tokens.zarr3')
    # A token array never changes: a cached chunk need not be asked again.
    return ts.open(
      spec | {'fill_missing_data_reads': False},
      open=True,
      read=True,
      context=self._context,
      recheck_cached_data=False,
      recheck_cached_metadata=False,
    )

  def _array(self, index: int, opening: ts.Future) -> ts.TensorStore:
    where = self._where(index)
    try:
      array = opening.result()
    except ValueError as error:
      self._opened.cache_clear()  # it may be there the next time
      raise storage.unreadable(f'{where} cannot be opened', error) from None
    found = (array.dtype.name, array.shape)
    wanted = (self.manifest.dtype, (self.shards[index].tokens,))
    if found != wanted:
      raise ValueError(
        f'{where} is {found[0]}{list(found[1])}, the manifest says '
        f'{wanted[0]}{list(wanted[1])}; the dataset is damaged: prepare again'
      )
    return array

  @property
  def vocab_size(self) -> int:
    return self.manifest.vocab_size

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the shards' lengths and digests, wherever they lie."""
    text = ''.join(f'{shard.tokens} {shard.sha256}\n' for shard in self.shards)
    return hashlib.sha256(text.encode()).hexdigest()

  def read(self, start: int, stop: int) -> Integer[np.ndarray, ' n']:
    """Tokens start..stop-1 of the split, in the shards' dtype.

    Raises:
      IndexError: the range leaves the split.
      ValueError: a chunk is missing or damaged, or an id is past the
        vocabulary.
      OSError: it cannot be read.
    """
    return read([(self, start, stop)])[0]

  def steps(self, start: int, stop: int) -> Generator[np.ndarray | None]:
    """`read` in three steps: arrays asked for, tokens asked for, tokens."""
    index = int(np.searchsorted(self._starts, start, 'right')) - 1
    pieces = []  # of one shard each: (its index, first, last + 1)
    while index < len(self.shards) and self._starts[index] < stop:
      begin, end = map(int, self._starts[index : index + 2])
      pieces.append((index, max(start, begin) - begin, min(stop, end) - begin))
      index += 1
    keys = [object() for _ in pieces]
    try:
      opening = [self._opened(index) for index, _, _ in pieces]
      self._note(keys, pieces, opening)
      yield
      reading = [
        self._array(index, array)[low:high].read()
        for (index, low, high), array in zip(pieces, opening, strict=True)
      ]
      self._note(keys, pieces, reading)
      yield
      parts = []
      for (index, _, _), part in zip(pieces, reading, strict=True):
        try:
          parts.append(part.result())
        except ValueError as error:
          raise storage.unreadable(self._where(index), error) from None
    finally:
      for key in keys:
        self._pending.pop(key, None)
    tokens = (
      np.concatenate(parts) if parts else np.zeros(0, self.manifest.dtype)
    )
    if tokens.size and int(tokens.max()) >= self.vocab_size:
      raise ValueError(
        f'{self.root}: token {start + int(tokens.argmax())} of the split has '
        f'id {tokens.max()}, past the vocabulary of {self.vocab_size}; the '
        'dataset is damaged: prepare again'
      )
    yield tokens

  def _note(self, keys, pieces, futures):
    now = time.monotonic()
    for key, (index, _, _), future in zip(keys, pieces, futures, strict=True):
      self._pending[key] = (self._where(index), now, future)

  def waiting(self) -> dict[str, float]:
    """Arrays that are asked for and have not come, and for how many seconds.

    From any thread, while others read.
    """
    now, found = time.monotonic(), {}
    for path, since, future in self._pending.copy().values():
      if not future.done():
        found[path] = max(now - since, found.get(path, 0.0))
    return found

  def verify(self):
    """Reads every token against the digests and the vocabulary.

    Raises:
      ValueError: a shard differs from its manifest entry.
    """
    for shard, start in zip(self.shards, self._starts, strict=False):
      tokens = self.read(int(start), int(start) + shard.tokens)
      little = tokens.astype(tokens.dtype.newbyteorder('<'))
      if hashlib.sha256(little).hexdigest() != shard.sha256:
        raise ValueError(
          f'{self.root}/{shard.path} does not match its digest; the dataset '
          'is damaged: prepare again'
        )


def read(
  ranges: Sequence[tuple[TokenSource, int, int]],
) -> list[Integer[np.ndarray, ' n']]:
  """`source.read(start, stop)` of each, all asked for before one is awaited.

  Raises:
    as `TokenSource.read`.
  """
  for source, start, stop in ranges:
    if not 0 <= start <= stop <= source.tokens:
      raise IndexError(
        f'tokens {start}..{stop} of a split of {source.tokens} tokens'
      )
  readings = [source.steps(start, stop) for source, start, stop in ranges]
  try:
    *_, tokens = ([next(r) for r in readings] for _ in range(3))
    return cast(list[np.ndarray], tokens)
  finally:
    for reading in readings:
      reading.close()


def open_split(root: str | Path, split: str) -> TokenSource:
  """Opens a split of a dataset.

  Raises:
    FileNotFoundError: not a finished dataset.
    ValueError: no such split, or manifest and arrays disagree.
  """
  manifest = read_manifest(root)
  if split not in manifest.splits:
    raise ValueError(
      f'{root} has no split {split!r}; it has {sorted(manifest.splits)}'
    )
  return TokenSource(root, manifest, split)
