# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tritera_jax.scaling import laws, plan, readings
from tritera_jax.scaling.costs import Shapes

TRILM, FLOATLM = laws.TRILM_SPECTRA_1_1, laws.FLOATLM_SPECTRA_1_1


def test_both_readings_of_the_paper_s_exponents():
  # Of Spectra 1.1: the exponent of data is 2.5 times that of parameters, yet
  # N ~ C^0.717, and at 150e9 tokens data has 0.09 nats left.
  said = readings.readings(TRILM, [TRILM, TRILM], 1e9, 150e9)
  assert said.ratio.estimate == pytest.approx(2.5, abs=0.05)
  assert said.parameters_exponent.estimate == pytest.approx(0.717, abs=5e-4)
  assert said.tokens_exponent.estimate == pytest.approx(0.283, abs=5e-4)
  assert said.gain_of_tokens.estimate == pytest.approx(0.81 * 0.09, abs=2e-3)
  assert said.share_for_parameters == 1.0
  floats = readings.readings(FLOATLM, [], 1e9, 150e9)
  assert floats.parameters_exponent.estimate == pytest.approx(0.486, abs=5e-4)
  assert np.isnan(floats.ratio.low)


def test_gains_are_differences_of_the_law():
  said = readings.readings(TRILM, [], 1e9, 300e9)
  # Of Spectra 1.1: 300e9 to 1.2e12 tokens gains 0.034 nats; two doublings.
  later = readings.readings(TRILM, [], 1e9, 600e9)
  assert (
    said.double_tokens.estimate + later.double_tokens.estimate
    == pytest.approx(0.034, abs=5e-4)
  )
  step = 1e-5
  for gain, n, d in (
    (said.gain_of_parameters, step, 0), (said.gain_of_tokens, 0, step),
  ):  # fmt: skip
    moved = TRILM(1e9, 300e9) - TRILM(1e9 * np.exp(n), 300e9 * np.exp(d))
    assert gain.estimate == pytest.approx(float(moved) / step, rel=1e-4)


def test_at_the_compute_optimum_both_gain_the_same():
  families = {'ternary': plan.Fitted(TRILM, (), (1e8, 1e9), (2e10, 1.5e11))}
  shapes = Shapes('without_embeddings')
  choice = plan.best(families, plan.Budget(1e22), shapes)[0]
  said = readings.readings(
    TRILM, [], choice.parameters.estimate, choice.tokens.estimate
  )
  assert said.gain_of_parameters.estimate == pytest.approx(
    said.gain_of_tokens.estimate, rel=1e-3
  )
