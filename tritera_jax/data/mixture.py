# SPDX-License-Identifier: Apache-2.0
"""Which window of which source a row of the run is: pure functions.

Rows are counted over the whole run: row r is that of place r % B in batch
r // B. All is whole numbers without a bound, so that nothing is rounded and
nothing overflows, however many tokens came before.
"""

import bisect
from collections.abc import Sequence
import hashlib
import itertools
import math
import struct

Schedule = Sequence[tuple[int, Sequence[int]]]
_ROUNDS = 8  # of 5 and more, every permutation equally often


class Mixture:
  """Rows shared out among sources, in a way that can be entered anywhere.

  A stretch of batches has constant shares. There, a binary tree with the
  sources as leaves deals its rows: of the first k rows that come to a node,
  round(k l / (l + r)) go left, l and r being the sums of the shares below it.
  So a node is within 1/2 of what its own rows would give it, and a source,
  after any number of rows of the stretch, within ceil(log2 m) / 2 rows of its
  exact share of them, m being the sources with a share. (Rounding each
  source by itself would be closer, but those counts do not add up.)

  A source with share 0 is in no tree: sources that join later change nothing
  before.
  """

  def __init__(self, schedule: Schedule, batch_size: int):
    """Of `DataConfig.schedule`: (first batch, shares) of each stretch.

    Raises:
      ValueError: the first stretch does not begin at batch 0, or they are not
        in order, or the numbers of shares differ, or all of one are 0.
    """
    steps = [step for step, _ in schedule]
    if steps[:1] != [0] or steps != sorted(set(steps)):
      raise ValueError(f'stretches begin at batches {steps}: not 0 and rising')
    self._count = len(schedule[0][1])
    self._first = [step * batch_size for step in steps]
    self._trees = []
    for step, shares in schedule:
      if len(shares) != self._count or min(shares) < 0 or not any(shares):
        raise ValueError(
          f'batch {step}: shares are {list(shares)}, wanted {self._count}, '
          '>= 0, and one that is not 0'
        )
      self._trees.append(_Tree(shares))
    # Rows of each source before each stretch.
    self._before = [[0] * self._count]
    for tree, (first, end) in zip(
      self._trees, itertools.pairwise(self._first), strict=False
    ):
      self._before.append(_add(self._before[-1], tree.counts(end - first)))

  def locate(self, row: int) -> tuple[int, int]:
    """Source of a row, and how many rows before it were of that source."""
    stretch = bisect.bisect_right(self._first, row) - 1
    source, place = self._trees[stretch].locate(row - self._first[stretch])
    return source, self._before[stretch][source] + place

  def counts(self, rows: int) -> list[int]:
    """How many of the first `rows` rows are of each source."""
    stretch = bisect.bisect_right(self._first, rows) - 1
    own = self._trees[stretch].counts(rows - self._first[stretch])
    return _add(self._before[stretch], own)


def _add(a: list[int], b: list[int]) -> list[int]:
  return [x + y for x, y in zip(a, b, strict=True)]


class _Tree:
  """One stretch of a mixture, its rows counted from 0."""

  def __init__(self, shares: Sequence[int]):
    self._sources = [i for i, share in enumerate(shares) if share]
    self._sums = [0, *itertools.accumulate(shares[i] for i in self._sources)]
    self._count = len(shares)

  def _left(self, low: int, middle: int, high: int, rows: int) -> int:
    """Of the first rows that come to leaves low..high-1, those below middle."""
    left = self._sums[middle] - self._sums[low]
    both = self._sums[high] - self._sums[low]
    return (2 * rows * left + both) // (2 * both)

  def locate(self, row: int) -> tuple[int, int]:
    low, high = 0, len(self._sources)
    while high - low > 1:
      middle = (low + high) // 2
      left = self._left(low, middle, high, row)
      if self._left(low, middle, high, row + 1) > left:
        high, row = middle, left
      else:
        low, row = middle, row - left
    return self._sources[low], row

  def counts(self, rows: int) -> list[int]:
    found = [0] * self._count
    nodes = [(0, len(self._sources), rows)]
    for low, high, rows in nodes:  # which grows meanwhile
      if high - low == 1:
        found[self._sources[low]] = rows
        continue
      middle = (low + high) // 2
      left = self._left(low, middle, high, rows)
      nodes += [(low, middle, left), (middle, high, rows - left)]
    return found


def shuffled(index: int, count: int, *key: int) -> int:
  """Place `index` of the permutation of range(count) that the key chooses.

  A generalised Feistel network (Black and Rogaway 2002, FE1): range(count)
  lies in a rectangle of about sqrt(count) a side, and each round moves one
  coordinate, around, by a keyed hash of the other, which can be undone; what
  falls beside the range goes through again. It needs no memory, and a random
  function is behind it, so that neighbours part.

  Grain's index_shuffle is not that: at 2^32 + 1 elements, 0 and 2^32 go to
  one place, and of 2^20, the places of neighbours correlate by 0.47.

  Args:
    index: from 0 to count - 1.
    count: elements, any number below 2^64.
    *key: whole numbers from 0 to 2^64 - 1, at most eight.
  """
  keyed = hashlib.blake2b(digest_size=8, key=struct.pack(f'<{len(key)}Q', *key))
  width = math.isqrt(count - 1) + 1
  height = -(-count // width)
  while True:
    y, x = divmod(index, width)
    for number in range(_ROUNDS):
      x = (x + _hashed(keyed, y, 2 * number)) % width
      y = (y + _hashed(keyed, x, 2 * number + 1)) % height
    index = y * width + x
    if index < count:
      return index


def _hashed(keyed: hashlib.blake2b, coordinate: int, number: int) -> int:
  hashed = keyed.copy()
  hashed.update(struct.pack('<QQ', coordinate, number))
  return int.from_bytes(hashed.digest(), 'little')
