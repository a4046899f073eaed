# SPDX-License-Identifier: Apache-2.0
"""Batches of token windows: batch n is a function of (seed, schedule, n).

Training windows are T+1 tokens that start every T, so that every token but
the first is a target once an epoch. They cross documents, which end with the
end-of-text token, and shards; the last tokens that fill no window are left
out. (Whether attention crosses documents too is the model's to say:
`ModelConfig.document_separator`.) Each epoch is shuffled anew. Several
sources are interleaved by weight, each endless in its own epochs
(`mixture`). How many hosts read is no part of it.
"""

from collections.abc import Iterator, Sequence
import sys

import grain
from jaxtyping import Float, Int32, Integer
import numpy as np

from tritera_jax.data import mixture, shards
from tritera_jax.data.mixture import Mixture, Schedule
from tritera_jax.data.shards import TokenSource

_READERS = 4  # threads: reading is latency, not work
_ALONE: Schedule = ((0, (1,)),)  # of one source

Windows = tuple[
  Int32[np.ndarray, 'W T'],
  Int32[np.ndarray, 'W T'],
  Float[np.ndarray, 'W T'],
]


class _Batches:
  """Random access to rows of global batches, as Grain wants it."""

  def __init__(
    self,
    sources: Sequence[TokenSource],
    rows_of: Mixture,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: range,
  ):
    self.sources, self.mixture = sources, rows_of
    self.size, self.length = batch_size, sequence_length
    self.seed, self.rows = seed, rows
    self.counts = [_windows_in(source, sequence_length) for source in sources]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index) -> dict[str, Int32[np.ndarray, 'b T1']]:
    first = int(index) * self.size
    ranges = []
    for row in self.rows:
      number, place = self.mixture.locate(first + row)
      count = self.counts[number]
      epoch, place = divmod(place, count)
      window = mixture.shuffled(place, count, self.seed, number, epoch)
      start = window * self.length
      ranges.append((self.sources[number], start, start + self.length + 1))
    return {'tokens': np.stack(shards.read(ranges)).astype(np.int32)}


def batches(
  sources: Sequence[TokenSource],
  schedule: Schedule = _ALONE,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
  rows: slice = slice(None),
) -> grain.MapDataset:
  """An endless dataset whose n-th element is global batch n, or rows of it.

  Elements are {'tokens': int32 [batch_size, sequence_length + 1]}. Batches
  may span epochs.

  Args:
    sources: the splits to read.
    schedule: `DataConfig.schedule`: the first batch, and the shares of rows
      of each source, of every stretch of batches.
    batch_size: of the global batch, whatever `rows` is.
    sequence_length: T; a row is T + 1 tokens.
    seed: of the order of windows, from 0 to 2^64 - 1.
    rows: those of the global batch to read: a host's share. The others are
      not read.

  Raises:
    ValueError: a split holds no whole window, or a batch no row.
  """
  if sequence_length < 1:
    raise ValueError(
      f'data.sequence_length={sequence_length} must be at least 1'
    )
  if batch_size < 1:
    raise ValueError(f'data.batch_size={batch_size} must be at least 1')
  chosen = range(batch_size)[rows]
  if not chosen:
    raise ValueError(f'rows={rows} are none of data.batch_size={batch_size}')
  if len(sources) != len(schedule[0][1]):
    raise ValueError(
      f'{len(sources)} sources have {len(schedule[0][1])} shares'
    )
  for source in sources:
    if _windows_in(source, sequence_length) < 1:
      raise ValueError(
        f'data.sequence_length={sequence_length} needs at least '
        f'{sequence_length + 1} tokens, but {source.root} has {source.tokens}'
      )
  return grain.MapDataset.source(
    _Batches(
      sources,
      Mixture(schedule, batch_size),
      batch_size,
      sequence_length,
      seed,
      chosen,
    )
  )


def _windows_in(source: TokenSource, sequence_length: int) -> int:
  return (source.tokens - 1) // sequence_length


def epochs(
  sources: Sequence[TokenSource],
  schedule: Schedule,
  steps: int,
  batch_size: int,
  sequence_length: int,
) -> list[float]:
  """How often each source is read in the first `steps` batches."""
  counts = Mixture(schedule, batch_size).counts(steps * batch_size)
  return [
    count / _windows_in(source, sequence_length)
    for source, count in zip(sources, counts, strict=True)
  ]


def waiting(sources: Sequence[TokenSource]) -> list[tuple[str, float]]:
  """Shards that are being read and for how many seconds, the longest first.

  From any thread, while others read.
  """
  found = [item for source in sources for item in source.waiting().items()]
  return sorted(found, key=lambda item: -item[1])


def iterate(
  dataset: grain.MapDataset, start: int, *, prefetch: int = 2 * _READERS
) -> Iterator[dict[str, Int32[np.ndarray, 'B T1']]]:
  """Batches start, start + 1, ...: up to `prefetch` are read ahead, by threads.

  With prefetch=0 each is read when it is asked for.
  """
  options = grain.ReadOptions(
    num_threads=min(_READERS, prefetch), prefetch_buffer_size=prefetch
  )
  yield from dataset.slice(slice(start, None)).to_iter_dataset(options)


def windows(
  source: TokenSource,
  sequence_length: int,
  stride: int,
  limit_tokens: int | None = None,
) -> Windows:
  """The windows of a split: see `windows_of`.

  Args:
    source: the split.
    sequence_length: T.
    stride: from 1 to T.
    limit_tokens: score only that many, from the start.

  Raises:
    ValueError: the stride is not from 1 to T.
  """
  return windows_of(
    source.read(0, min(source.tokens, limit_tokens or source.tokens)),
    source.manifest.end_of_text,
    sequence_length,
    stride,
  )


def windows_of(
  ids: Integer[np.ndarray, ' n'],
  end_of_text: int,
  sequence_length: int,
  stride: int,
) -> Windows:
  """Inputs, targets and weights that score every token of a text once.

  The text is preceded by an end-of-text token, so that its first token is a
  target too. Windows advance by `stride`; of each, the last `stride` targets
  have weight 1 (all of the first window's), the others 0: a scored token sees
  at least T - stride tokens before it.

  Args:
    ids: the text.
    end_of_text: id.
    sequence_length: T.
    stride: from 1 to T.

  Raises:
    ValueError: the stride is not from 1 to T.
  """
  T = sequence_length
  if not 1 <= stride <= T:
    raise ValueError(f'stride={stride} must lie in 1..sequence_length={T}')
  total = len(ids)
  count = 1 + max(0, -(-(total - T) // stride))
  text = np.zeros(1 + T + (count - 1) * stride, np.int32)
  text[0] = end_of_text
  text[1 : 1 + total] = ids
  index_WT = np.arange(count)[:, None] * stride + np.arange(T)
  weights_WT = (index_WT < total).astype(np.float32)
  weights_WT[1:, : T - stride] = 0
  return text[index_WT], text[index_WT + 1], weights_WT
