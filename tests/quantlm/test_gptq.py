# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tests.quantlm import oracle
from tritera_jax.quantlm import gptq, uniform
from tritera_jax.quantlm.uniform import Grid


def problem(seed, K, N, tokens):
  """Weights, and the sum of x x^T of inputs that depend on each other."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(tokens, K // 3)) @ rng.normal(size=(K // 3, K))
  x += 0.3 * rng.normal(size=(tokens, K))
  return rng.normal(size=(K, N)), x.T @ x


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('group', [8, None])
def test_codes_are_those_of_optimal_brain_quantization(bits, group, symmetric):
  w_KN, gram_KK = problem(bits, 24, 5, 100)
  grid = Grid(bits, group, symmetric)
  got = gptq.gptq(w_KN, gptq.factor(gram_KK, 0.01), grid)
  codes, values = oracle.gptq(
    w_KN.T, gram_KK, bits, group or 24, symmetric, 0.01
  )
  np.testing.assert_array_equal(got.codes_KN, codes.T)
  np.testing.assert_allclose(got.dequantize(), values.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize('block', [7, 12])
def test_blocks_change_nothing(monkeypatch, block):
  """More inputs than a block; 7 does not divide them."""
  monkeypatch.setattr(gptq, '_BLOCK', block)
  w_KN, gram_KK = problem(0, 36, 4, 100)
  got = gptq.gptq(w_KN, gptq.factor(gram_KK, 0.01), Grid(4, None, True))
  codes, _ = oracle.gptq(w_KN.T, gram_KK, 4, 36, True, 0.01)
  np.testing.assert_array_equal(got.codes_KN, codes.T)


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_it_beats_rounding_where_inputs_are_correlated(seed, bits):
  w_KN, gram_KK = problem(seed, 48, 8, 400)

  def error(quantized):
    d_KN = w_KN - quantized.dequantize()
    return np.trace(d_KN.T @ gram_KK @ d_KN)

  for group in (16, None):
    grid = Grid(bits, group, True)
    ours = error(gptq.gptq(w_KN, gptq.factor(gram_KK, 0.01), grid))
    assert ours < 0.8 * error(uniform.round_to_nearest(w_KN, grid))


def test_it_is_rounding_where_inputs_are_not_correlated():
  w_KN, _ = problem(0, 24, 5, 10)
  factor_KK = gptq.factor(np.diag(np.arange(1.0, 25)), 0.01)
  got = gptq.gptq(w_KN, factor_KK, Grid(3, 8, False))
  want = uniform.round_to_nearest(w_KN, Grid(3, 8, False))
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_the_factor_is_that_of_the_damped_inverse():
  _, gram_KK = problem(1, 24, 5, 10)  # of rank 10 at most
  u_KK = gptq.factor(gram_KK, 0.01)
  damped_KK = gram_KK + 0.01 * np.diag(gram_KK).mean() * np.eye(24)
  np.testing.assert_allclose(u_KK, np.triu(u_KK))
  np.testing.assert_allclose(u_KK.T @ u_KK @ damped_KK, np.eye(24), atol=1e-9)


def test_sums_without_an_inverse_are_refused():
  _, gram_KK = problem(1, 24, 5, 10)
  with pytest.raises(ValueError, match='damping=0.0: .*span too few of their '
                     '24 dimensions'):  # fmt: skip
    gptq.factor(gram_KK, 0.0)
  with pytest.raises(ValueError, match='span too few'):
    gptq.factor(np.zeros((3, 3)), 0.01)
  gram_KK[3, 3] = np.nan
  with pytest.raises(ValueError, match='or are not finite'):
    gptq.factor(gram_KK, 0.01)
