# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from tritera_jax.scaling import laws

SPECTRA_1_1 = laws.FLOATLM_SPECTRA_1_1


@pytest.mark.parametrize(('percent', 'parameters'), [
  (6, 329.92e9), (7, 15.65e9),
])  # fmt: skip
def test_spectra_1s_gap_is_as_published(percent, parameters):
  """Spectra, section 4: where TriLM's loss is so far above FloatLM's."""
  float_loss = laws.FLOATLM_SPECTRA_1(parameters)
  gap = laws.TRILM_SPECTRA_1(parameters) / float_loss - 1
  # The rounding of its E alone moves the gap by so much.
  assert 100 * gap == pytest.approx(percent, abs=0.4)


def test_spectra_1_1_takes_millions_and_billions():
  by_hand = 2.19 + 4.73 / 99.74**0.32 + 5.18 / 300**0.81
  assert laws.TRILM_SPECTRA_1_1(99.74e6, 300e9) == pytest.approx(by_hand)
  sizes, data = SPECTRA_1_1.terms([1e6, 1e9], [1e9, 1e9])
  np.testing.assert_allclose(sizes, [7.86, 7.86 / 1000**0.56])
  np.testing.assert_allclose(data, 3.42)


def test_constants_in_a_papers_units_are_those_it_prints():
  constants = SPECTRA_1_1.constants(parameters=1e6, tokens=1e9)
  assert constants == pytest.approx(
    {'E': 2.17, 'A': 7.86, 'alpha': 0.56, 'B': 3.42, 'beta': 0.53}
  )


def test_a_law_in_bits_counts_parameters_by_what_they_hold():
  law = laws.BitsLaw(SPECTRA_1_1, gamma=2.0)
  assert law.capacity(2.0) == pytest.approx(1 - 1 / math.e)
  assert law(1e9, 1e11, 1e3) == pytest.approx(SPECTRA_1_1(1e9, 1e11))
  ternary = laws.BITS['ternary']
  effective = 1e9 * (1 - math.exp(-ternary / 2))
  by_hand = SPECTRA_1_1(effective, 1e11)
  assert law(1e9, 1e11, ternary) == pytest.approx(by_hand)
  assert law.at(ternary)(1e9, 1e11) == pytest.approx(by_hand)


def test_a_constant_that_is_no_number_is_refused():
  with pytest.raises(ValueError, match='alpha=nan of a law'):
    laws.PowerLaw(E=1.0, A=1.0, alpha=math.nan, counted='all')
