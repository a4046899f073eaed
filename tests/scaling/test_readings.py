# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tritera_jax.scaling import laws, plan, readings
from tritera_jax.scaling.costs import Shapes

TRILM, FLOATLM = laws.TRILM_SPECTRA_1_1, laws.FLOATLM_SPECTRA_1_1


def test_both_readings_of_the_paper_s_exponents():
  # paper.md 4.2: the exponent of data is 2.5 times that of parameters, yet
  # N ~ C^0.717, and at 150e9 tokens data has 0.09 nats left.
  said = readings.readings(TRILM, [TRILM, TRILM], 1e9, 150e9)
  assert said.ratio.value == pytest.approx(2.5, abs=0.05)
  assert said.parameters_exponent.value == pytest.approx(0.717, abs=5e-4)
  assert said.tokens_exponent.value == pytest.approx(0.283, abs=5e-4)
  assert said.gain_of_tokens.value == pytest.approx(0.81 * 0.09, abs=2e-3)
  assert said.share_for_parameters == 1.0
  floats = readings.readings(FLOATLM, [], 1e9, 150e9)
  assert floats.parameters_exponent.value == pytest.approx(0.486, abs=5e-4)
  assert np.isnan(floats.ratio.low)


def test_gains_are_differences_of_the_law():
  said = readings.readings(TRILM, [], 1e9, 300e9)
  # paper.md 4.2: 300e9 to 1.2e12 tokens gains 0.034 nats; two doublings.
  later = readings.readings(TRILM, [], 1e9, 600e9)
  assert said.double_tokens.value + later.double_tokens.value == pytest.approx(
    0.034, abs=5e-4
  )
  step = 1e-5
  for gain, n, d in (
    (said.gain_of_parameters, step, 0), (said.gain_of_tokens, 0, step),
  ):  # fmt: skip
    moved = TRILM(1e9, 300e9) - TRILM(1e9 * np.exp(n), 300e9 * np.exp(d))
    assert gain.value == pytest.approx(float(moved) / step, rel=1e-4)


def test_at_the_compute_optimum_both_gain_the_same():
  families = {'ternary': plan.Fitted(TRILM, (), (1e8, 1e9), (2e10, 1.5e11))}
  shapes = Shapes('without_embeddings')
  choice = plan.best(families, plan.Budget(1e22), shapes)[0]
  said = readings.readings(
    TRILM, [], choice.parameters.value, choice.tokens.value
  )
  assert said.gain_of_parameters.value == pytest.approx(
    said.gain_of_tokens.value, rel=1e-3
  )


def test_spectra_1_gaps():
  # paper.md 4.1: 6 % of the FloatLM loss at 329.92e9 parameters, 7 % at
  # 15.65e9; they do not cross, TriLM's E is above.
  N = np.array([15.65e9, 329.92e9])
  trilm = laws.TRILM_SPECTRA_1(N)
  floatlm = laws.FLOATLM_SPECTRA_1(N)
  np.testing.assert_allclose(trilm / floatlm - 1, [0.07, 0.06], atol=4e-3)
  grid = np.geomspace(1e8, 1e13, 1001)
  crossed = readings.crossing(
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

  crossed = readings.crossing(
    grid,
    {
      'ternary': np.stack([loss(E, 400) for E in (1.7, 1.7, 1.75, 1.9)]),
      'float': np.stack([loss(1.8, 200)] * 4),
    },
  )
  assert crossed.at is not None
  assert crossed.at.value == pytest.approx(2000 ** (1 / 0.3), rel=1e-3)
  assert crossed.loss == pytest.approx(1.9, abs=1e-5)
  assert (crossed.before, crossed.after) == ('float', 'ternary')
  assert crossed.share == pytest.approx(2 / 3)
  ends = np.quantile([2000 ** (1 / 0.3), 4000 ** (1 / 0.3)], [0.025, 0.975])
  np.testing.assert_allclose([crossed.at.low, crossed.at.high], ends, rtol=2e-3)


def test_of_two_crossings_the_last_is_told():
  grid = np.geomspace(1, 1e4, 4001)
  x = np.log10(grid)
  crossed = readings.crossing(
    grid,
    {'ternary': (x - 1) [None] * (x - 3)[None], 'float': np.zeros((1, 4001))},
  )  # fmt: skip
  assert crossed.at is not None
  assert crossed.at.value == pytest.approx(1e3, rel=1e-3)
  assert (crossed.before, crossed.after) == ('ternary', 'float')
