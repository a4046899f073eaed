# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ternary import oracle
from tritera_jax.ternary import stats


def test_statistics_are_those_counted_by_hand():
  rng = np.random.default_rng(0)
  w_KN = (0.02 * rng.standard_normal((64, 48))).astype(np.float32)
  step_KN = (0.002 * rng.standard_normal((64, 48))).astype(np.float32)
  before, _, gammas_before = oracle.ternary(w_KN.T, 2, 'out')
  codes, _, gammas = oracle.ternary((w_KN + step_KN).T, 2, 'out')
  got = stats.matrix_stats(
    jnp.asarray(w_KN + step_KN),
    jnp.asarray(before.T, jnp.int8),
    jnp.asarray(gammas_before, jnp.float32),
    'out',
  )
  threshold = np.repeat(gammas, 24)[None, :] / 2
  near = np.abs(np.abs(w_KN + step_KN) - threshold) < 0.1 * threshold
  assert got['zero_fraction'] == pytest.approx((codes == 0).mean())
  assert got['flip_fraction'] == pytest.approx((codes != before).mean())
  assert got['near_threshold'] == pytest.approx(near.mean(), abs=1e-3)
  assert got['scale'] == pytest.approx(gammas.mean(), rel=1e-6)
  drift = np.abs(gammas / gammas_before - 1).mean()
  assert got['scale_drift'] == pytest.approx(drift, rel=1e-3)
  assert 0 < got['flip_fraction'] < 0.2
