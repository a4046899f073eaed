# SPDX-License-Identifier: Apache-2.0
"""Batches of token windows: batch n is a pure function of (seed, n).

Training windows are T+1 tokens that start every T, so that every token but
the first is a target once an epoch. They cross documents, which end with the
end-of-text token, and shards; the last tokens that fill no window are left
out. Each epoch is shuffled anew.
"""

from collections.abc import Iterator

import grain
from jaxtyping import Float, Int32
import numpy as np

from tritera_jax.data.shards import TokenSource

_READERS = 4  # threads: reading is latency, not work


class _Windows:
  """Random access to training windows, as Grain wants it."""

  def __init__(self, source: TokenSource, sequence_length: int):
    self.source, self.length = source, sequence_length

  def __len__(self) -> int:
    return max(0, (self.source.tokens - 1) // self.length)

  def __getitem__(self, index) -> dict[str, Int32[np.ndarray, ' T1']]:
    start = int(index) * self.length
    tokens = self.source.read(start, start + self.length + 1)
    return {'tokens': tokens.astype(np.int32)}


def batches(
  source: TokenSource,
  *,
  batch_size: int,
  sequence_length: int,
  seed: int,
) -> grain.MapDataset:
  """An endless dataset whose n-th element is global batch n.

  Elements are {'tokens': int32 [batch_size, sequence_length + 1]}. Batches
  may span epochs.

  Raises:
    ValueError: the split holds no whole window.
  """
  windows = _Windows(source, sequence_length)
  if not len(windows):
    raise ValueError(
      f'data.sequence_length={sequence_length} needs at least '
      f'{sequence_length + 1} tokens, but {source.root} has {source.tokens}'
    )
  return (
    grain.MapDataset.source(windows)
    .seed(seed)
    .shuffle()
    .repeat()
    .batch(batch_size)
  )


def iterate(
  dataset: grain.MapDataset, start: int
) -> Iterator[dict[str, Int32[np.ndarray, 'B T1']]]:
  """Batches start, start + 1, ..., read ahead by threads."""
  options = grain.ReadOptions(
    num_threads=_READERS, prefetch_buffer_size=2 * _READERS
  )
  yield from dataset.slice(slice(start, None)).to_iter_dataset(options)


def windows(
  source: TokenSource,
  sequence_length: int,
  stride: int,
  limit_tokens: int | None = None,
) -> tuple[
  Int32[np.ndarray, 'W T'],
  Int32[np.ndarray, 'W T'],
  Float[np.ndarray, 'W T'],
]:
  """Inputs, targets and weights that score every token of a split once.

  The text is preceded by an end-of-text token, so that its first token is a
  target too. Windows advance by `stride`; of each, the last `stride` targets
  have weight 1 (all of the first window's), the others 0: a scored token sees
  at least T - stride tokens before it.

  Args:
    source: the split.
    sequence_length: T.
    stride: from 1 to T.
    limit_tokens: score only that many, from the start.

  Raises:
    ValueError: the stride is not from 1 to T.
  """
  T = sequence_length
  if not 1 <= stride <= T:
    raise ValueError(f'stride={stride} must lie in 1..sequence_length={T}')
  total = min(source.tokens, limit_tokens or source.tokens)
  count = 1 + max(0, -(-(total - T) // stride))
  text = np.zeros(1 + T + (count - 1) * stride, np.int32)
  text[0] = source.manifest.end_of_text
  text[1 : 1 + total] = source.read(0, total)
  index_WT = np.arange(count)[:, None] * stride + np.arange(T)
  weights_WT = (index_WT < total).astype(np.float32)
  weights_WT[1:, : T - stride] = 0
  return text[index_WT], text[index_WT + 1], weights_WT
