# SPDX-License-Identifier: Apache-2.0
from collections import Counter
import dataclasses
import fractions
import hashlib
import itertools
import math
import shutil

import numpy as np
import pytest

from tests import tiny
from tritera_jax.data.mixture import Mixture, shuffled
from tritera_jax.experiment import DataConfig
from tritera_jax.train import loop

B = 8
SCHEDULES = {
  'one': ((0, (1,)),),
  'two': ((0, (7, 3)),),
  'rare': ((0, (1, 999_983)),),
  'many': ((0, tuple(range(1, 14))),),
  'joins': ((0, (3, 0, 1)), (5, (1, 1, 1)), (17, (0, 5, 2)), (90, (1, 0, 0))),
  'late': ((0, (2, 1, 5)), (2**41, (10**17, 1, 3)), (2**41 + 3, (1, 1, 1))),
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_rows_are_dealt_one_by_one_in_exact_shares(name):
  """Against counting, at the start and at the ends of every stretch."""
  schedule = SCHEDULES[name]
  mixture = Mixture(schedule, B)
  ends = [step for step, _ in schedule[1:]] + [2**45]
  for (step, shares), end in zip(schedule, ends, strict=True):
    m = sum(map(bool, shares))
    bound = fractions.Fraction(math.ceil(math.log2(m)), 2)
    first, last = step * B, end * B
    whole = mixture.counts(first)
    assert sum(whole) == first
    middle = (first + last) // 2
    for begin in {first, max(first, middle), max(first, last - 1000)}:
      seen = mixture.counts(begin)
      for row in range(begin, min(begin + 1000, last)):
        source, place = mixture.locate(row)
        assert shares[source] and place == seen[source], row
        seen[source] += 1
        for i, share in enumerate(shares):
          exact = fractions.Fraction(share, sum(shares)) * (row + 1 - first)
          assert abs(seen[i] - whole[i] - exact) <= bound, (row, i)
      assert seen == mixture.counts(min(begin + 1000, last))


def test_two_sources_are_the_digitised_line():
  """NumPy's rounding of k p is the count of the left of two."""
  mixture = Mixture(((0, (5, 8)),), 1)
  counts = np.array([mixture.counts(k)[0] for k in range(500)])
  np.testing.assert_array_equal(counts, np.round(np.arange(500) * 5 / 13))


def test_what_comes_later_changes_nothing_before():
  rows = 12 * B
  want = [Mixture(((0, (2, 3)),), B).locate(row) for row in range(rows)]
  for schedule in (
    ((0, (2, 3)), (12, (9, 1))),
    ((0, (2, 3, 0)), (12, (0, 0, 1)), (13, (2, 3, 5))),
  ):
    mixture = Mixture(schedule, B)
    assert [mixture.locate(row) for row in range(rows)] == want


@pytest.mark.parametrize(('schedule', 'message'), [
  (((1, (1,)),), r'begin at batches \[1\]'),
  (((0, (1,)), (5, (2,)), (5, (1,))), 'not 0 and rising'),
  (((0, (1, 1)), (5, (1,))), r'batch 5: shares are \[1\], wanted 2'),
  (((0, (0, 0)),), r'batch 0: shares are \[0, 0\]'),
])  # fmt: skip
def test_schedules_that_cannot_be_are_refused(schedule, message):
  with pytest.raises(ValueError, match=message):
    Mixture(schedule, B)


def test_shares_are_the_weights_as_they_are_written():
  data = DataConfig(
    'a', 1, 1, mixture=(('a', 0.1), ('b', 0.7), ('c', 0.0)),
    reweighted=(
      (5, (0.2, 1.4, 0.0)), (9, (1 / 3, 2 / 3, 0.0)), (12, (1e-3, 0.0, 2.0)),
    ),
  )  # fmt: skip
  assert data.schedule == (
    (0, (1, 7, 0)),  # in floats, 0.7 / 0.1 is not 7
    (9, (1, 2, 0)),  # 0.2 and 1.4 are no new stretch
    (12, (1, 0, 2000)),
  )
  assert DataConfig('a', 1, 1).schedule == ((0, (1,)),)


@pytest.mark.parametrize(('fields', 'message'), [
  ({'mixture': (('a', -1.0),)}, 'the weight of a is -1.0; it must be >= 0'),
  ({'mixture': (('a', math.inf),)}, 'the weight of a is inf'),
  ({'mixture': (('a', 1.0), ('b', 0.0))}, 'weight of b is 0 and stays so'),
  ({'mixture': (('a', 0.0), ('b', 0.0)), 'reweighted': ((1, (1.0, 1.0)),)},
   'data.mixture: every weight is 0'),
  ({'reweighted': ((1, (1.0, 1.0)),)}, 'step 1 has 2 weights, data.mixture 0'),
  ({'reweighted': ((0, (1.0,)),)}, 'step 0 comes after 0; steps must grow'),
  ({'reweighted': ((5, (1.0,)), (5, (2.0,)))}, 'step 5 comes after 5'),
  ({'reweighted': ((5, (0.0,)),)}, 'reweighted: step 5: every weight is 0'),
  ({'reweighted': ((5, (math.nan,)),)}, 'step 5: the weight of x is nan'),
  ({'seed': -1}, r'data.seed=-1 must lie in 0..2\^64-1'),
])  # fmt: skip
def test_weights_that_cannot_be_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    DataConfig('x', 1, 1, **fields)


def places(count: int, *key: int) -> list[int]:
  return [shuffled(i, count, *key) for i in range(count)]


@pytest.mark.parametrize('count', [1, 2, 3, 4, 5, 10, 15, 16, 17, 97, 5000])
def test_shuffling_is_rolling_rows_and_columns_of_a_rectangle(count):
  """The network as NumPy moves of a whole grid, each back from its place."""
  key = (3, 1, 4)
  width = math.ceil(math.sqrt(count))
  height = math.ceil(count / width)
  secret = np.array(key, '<u8').tobytes()

  def by(i, number):
    text = np.array([i, number], '<u8').tobytes()
    digest = hashlib.blake2b(text, digest_size=8, key=secret).digest()
    return int(np.frombuffer(digest, '<u8')[0])

  grid = np.arange(width * height).reshape(height, width)
  for number in range(0, 16, 2):
    for y in range(height):
      grid[y] = np.roll(grid[y], by(y, number) % width)
    for x in range(width):
      grid[:, x] = np.roll(grid[:, x], by(x, number + 1) % height)
  to = np.argsort(grid.reshape(-1))  # element -> where it lies
  want = to[:count]
  while (want >= count).any():
    want = np.where(want >= count, to[want], want)
  assert places(count, *key) == want.tolist()
  assert sorted(want) == list(range(count))


def test_every_order_of_few_is_equally_often():
  """Chi squared of 24 orders: 23 expected, 50 in one of a thousand."""
  orders = Counter(tuple(places(4, key)) for key in range(2400))
  squared = sum(
    (orders[o] - 100) ** 2 for o in itertools.permutations(range(4))
  )
  assert squared / 100 < 50


@pytest.mark.parametrize('count', [2**20, 585_937_500, 2**32 + 1, 2**40 + 15])
def test_neighbours_part_and_places_are_even(count):
  first = np.array([shuffled(i, count, 7, 0, 2) for i in range(2000)])
  again = np.array([shuffled(i, count, 7, 0, 3) for i in range(2000)])
  past = [shuffled(i, count, 7, 0, 2) for i in range(count - 500, count)]
  assert len({*first.tolist(), *past}) == 2500
  assert min(first) >= 0 and max(*first, *past) < count
  # Standard deviations of what independent draws would give: below 4.
  for a, b in (
    (first[:-1], first[1:]),
    (first, again),
    (first, np.arange(2000)),
  ):
    assert abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(2000) < 4
  cells = np.histogram(first, 50, (0, count))[0]
  assert ((cells - 40) ** 2 / 40).sum() < 49 + 4 * math.sqrt(2 * 49)


def test_a_resumed_run_takes_new_weights_as_if_it_had_always_had_them(
  tiny_data, tmp_path
):
  """tokens_digest is of all tokens trained on, in order."""
  twin = str(shutil.copytree(tiny_data, tmp_path / 'twin'))

  def train(folder, *reweighted):
    # 20 steps, as of `tiny_run`, whose program is compiled already.
    experiment = tiny.experiment(
      tiny_data, tmp_path / folder, 20, evaluate_every=0, telemetry_every=100
    )
    data = dataclasses.replace(
      experiment.data, mixture=((str(tiny_data), 0.3), (twin, 0.7)),
      reweighted=reweighted,
    )  # fmt: skip
    state = loop.train(dataclasses.replace(experiment, data=data), quiet=True)
    return int(state.tokens_digest)

  changes = ((4, (0.5, 0.5)), (10, (0.9, 0.1)))
  want = train('known', *changes)
  assert train('resumed', changes[0]) != want
  shutil.rmtree(tmp_path / 'resumed' / 'checkpoints' / '20')
  assert train('resumed', *changes) == want
  with pytest.raises(ValueError, match='batch 10 was drawn by other shares'):
    train('resumed', changes[0])
