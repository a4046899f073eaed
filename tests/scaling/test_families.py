# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tritera_jax.scaling import families, laws, plan
from tritera_jax.scaling.costs import Serving, Shapes


def test_spectra_1_gaps():
  # Of Spectra: 6 % of the FloatLM loss at 329.92e9 parameters, 7 % at
  # 15.65e9; they do not cross, TriLM's E is above.
  N = np.array([15.65e9, 329.92e9])
  trilm = laws.TRILM_SPECTRA_1(N)
  floatlm = laws.FLOATLM_SPECTRA_1(N)
  np.testing.assert_allclose(trilm / floatlm - 1, [0.07, 0.06], atol=4e-3)
  grid = np.geomspace(1e8, 1e13, 1001)
  crossed = families.crossing(
    grid,
    {
      'ternary': laws.TRILM_SPECTRA_1(grid)[None],
      'float': laws.FLOATLM_SPECTRA_1(grid)[None],
    },
  )
  assert (crossed.at, crossed.before, crossed.after) == (None, 'float', 'float')


def test_crossings_are_where_the_equation_says():
  # 1.7 + 400 N^-0.3 = 1.8 + 200 N^-0.3 at N = 2000^(1 / 0.3); a draw with E
  # higher by 0.05 crosses at 4000^(1 / 0.3), one by 0.2 nowhere.
  grid = np.geomspace(1e6, 1e14, 2001)

  def loss(E, A):
    return E + A * grid**-0.3

  crossed = families.crossing(
    grid,
    {
      'ternary': np.stack([loss(E, 400) for E in (1.7, 1.7, 1.75, 1.9)]),
      'float': np.stack([loss(1.8, 200)] * 4),
    },
  )
  assert crossed.at is not None
  assert crossed.at.estimate == pytest.approx(2000 ** (1 / 0.3), rel=1e-3)
  assert crossed.loss == pytest.approx(1.9, abs=1e-5)
  assert (crossed.before, crossed.after) == ('float', 'ternary')
  assert crossed.share == pytest.approx(2 / 3)
  ends = np.quantile([2000 ** (1 / 0.3), 4000 ** (1 / 0.3)], [0.05, 0.95])
  np.testing.assert_allclose([crossed.at.low, crossed.at.high], ends, rtol=2e-3)


def test_of_two_crossings_the_last_is_told():
  grid = np.geomspace(1, 1e4, 4001)
  x = np.log10(grid)
  crossed = families.crossing(
    grid,
    {'ternary': (x - 1) [None] * (x - 3)[None], 'float': np.zeros((1, 4001))},
  )  # fmt: skip
  assert crossed.at is not None
  assert crossed.at.estimate == pytest.approx(1e3, rel=1e-3)
  assert (crossed.before, crossed.after) == ('ternary', 'float')


def test_at_equal_bytes_the_paper_s_laws_cross_where_bisection_finds_it():
  trilm, floatlm = laws.TRILM_SPECTRA_1_1, laws.FLOATLM_SPECTRA_1_1
  pair = {
    name: plan.Fitted(law, (law, law), (99e6, 1.1e9), (20e9, 150e9))
    for name, law in (('ternary', trilm), ('float', floatlm))
  }
  # No embeddings: eight bits are 5 ternary parameters and half a float one.
  compared = families.compare(
    pair, Shapes('without_embeddings'), Serving(), 1.2e12
  )

  def apart(served):
    return float(trilm(5 * served, 1.2e12) - floatlm(served / 2, 1.2e12))

  low, high = 1e8, 1e10
  assert apart(low) < 0 < apart(high)
  for _ in range(60):
    middle = (low * high) ** 0.5
    low, high = (middle, high) if apart(middle) < 0 else (low, middle)
  found = compared['bytes'].crossing
  assert found.at is not None
  assert found.at.estimate == pytest.approx(low, rel=1e-3)
  assert (found.before, found.after, found.share) == ('ternary', 'float', 1.0)
  for row in compared['bytes'].rows:
    assert (apart(row.at) < 0) == (row.wins == 1.0)
  # "The two fits never cross", at equal parameters: float's
  # floor is lower and its exponent larger.
  equal = compared['parameters']
  assert (equal.crossing.at, equal.crossing.after) == (None, 'float')
  assert equal.rows[-1].at == pytest.approx(64 * 1.1e9)
  assert equal.rows[-1].beyond == pytest.approx(64)
  gap = equal.rows[0].losses['ternary'].estimate
  assert gap == pytest.approx(float(trilm(99e6, 1.2e12)), rel=1e-6)
