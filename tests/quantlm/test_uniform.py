# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest

from tests.quantlm import oracle
from tritera_jax import experiment_file
from tritera_jax.model import flops
from tritera_jax.quantlm import uniform
from tritera_jax.quantlm.run import Quantization
from tritera_jax.quantlm.uniform import Grid

# Spectra, Table 4: Gbit of QuantLM of 8, 6, 4 and 3 bits.
PAPER = {
  '99m': (1.21, 1.11, 1.03, 0.98),
  '190m': (2.14, 1.92, 1.72, 1.60),
  '390m': (3.96, 3.38, 2.88, 2.59),
  '560m': (5.58, 4.70, 3.93, 3.49),
  '830m': (7.91, 6.55, 5.36, 4.68),
  '1.1b': (10.64, 8.70, 7.00, 6.03),
  '1.5b': (13.77, 11.15, 8.86, 7.55),
  '2.4b': (21.55, 17.09, 13.18, 10.95),
  '3.9b': (34.39, 27.03, 20.59, 16.91),
}
BITS = (8, 6, 4, 3)


@pytest.mark.parametrize('size', PAPER)
def test_sizes_are_those_of_the_papers_table(size):
  model = experiment_file.load(f'experiments/spectra.py:floatlm_{size}').model
  for bits, gbit in zip(BITS, PAPER[size], strict=True):
    grid = Grid(bits, 128 if bits < 5 else None, symmetric=True)
    got = flops.size_bits(model, grid.bits_per_weight) / 1e9
    assert got == pytest.approx(gbit, abs=0.0101)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, *BITS])
def test_rounding_is_the_oracle_s_and_within_half_a_step(bits, symmetric):
  rng = np.random.default_rng(bits)
  # Groups of one sign, of one value, of zeros, and of all magnitudes.
  w_KN = rng.normal(size=(48, 6)) * np.logspace(-6, 2, 6)
  w_KN[:, 1], w_KN[:, 2] = abs(w_KN[:, 1]), 0
  w_KN[:16, 3] = -0.3
  grid = Grid(bits, 16, symmetric)
  got = uniform.round_to_nearest(w_KN, grid)
  values = got.dequantize()
  assert values.dtype == np.float32
  for n in range(6):
    for first in range(0, 48, 16):
      w = w_KN[first : first + 16, n]
      if not w.any():
        assert not values[first : first + 16, n].any()
        continue
      scale, zero = oracle.fit(w, bits, symmetric)
      codes = [oracle.code(v, scale, zero, bits) for v in w]
      assert got.codes_KN[first : first + 16, n].tolist() == codes
      assert float(got.scale_SN[first // 16, n]) == scale
      error = abs(values[first : first + 16, n] - w)
      assert (error <= scale / 2 * (1 + 1e-6)).all()


def test_one_group_is_a_column():
  w_KN = np.random.default_rng(0).normal(size=(6, 3))
  got = uniform.round_to_nearest(w_KN, Grid(3, None, True))
  assert got.scale_SN.shape == (1, 3)
  np.testing.assert_array_equal(
    got.dequantize(),
    uniform.round_to_nearest(w_KN, Grid(3, 6, True)).dequantize(),
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'bits': 1}, r'bits=1 must lie in 2\.\.8'),
    ({'bits': 9}, r'bits=9 must lie in 2\.\.8'),
    ({'group': 0}, 'group=0 must be >= 1, or None'),
    ({'samples': 0}, 'samples=0 must be >= 1'),
    ({'seed': -1}, r'seed=-1 must lie in 0\.\.2\^64-1'),
    ({'damping': float('nan')}, 'damping=nan must be >= 0'),
  ],
)
def test_a_quantization_that_makes_no_sense_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(Quantization(bits=4), **fields)


def test_matrices_that_do_not_fit_are_refused():
  w_KN = np.ones((6, 3))
  with pytest.raises(ValueError, match='group=4 does not divide the 6 inputs'):
    uniform.round_to_nearest(w_KN, Grid(4, 4, True))
  for value in (np.nan, np.inf, 1e9):
    w_KN[2, 1] = value
    with pytest.raises(ValueError, match='have no float16 scale'):
      uniform.round_to_nearest(w_KN, Grid(4, 2, True))
