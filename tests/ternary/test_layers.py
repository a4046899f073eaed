# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ternary import oracle
from tritera_jax.ternary import layers

ORACLES = {'ternary': oracle.ternary, 'binary': oracle.binary}


@pytest.mark.parametrize('family', ['ternary', 'binary'])
@pytest.mark.parametrize('axis', ['out', 'in'])
@pytest.mark.parametrize('blocks', [1, 3])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_forward_and_gradients_are_the_papers(family, axis, blocks, dtype):
  rng = np.random.default_rng(0)
  w_KN = (0.02 * rng.standard_normal((96, 48))).astype(np.float32)
  # Some latents beyond the clipping range: they keep their gradient.
  w_KN[:3] *= 10
  w_KN = jnp.asarray(w_KN)
  x = jnp.asarray(rng.standard_normal((2, 5, 96)), dtype)
  dy = jnp.asarray(rng.standard_normal((2, 5, 48)), dtype)

  def forward(x, w):
    return layers.straight_through_matmul(
      x, w, family=family, blocks=blocks, axis=axis
    )

  y, pullback = jax.vjp(forward, x, w_KN)
  dx, dw = pullback(dy)
  assert y.dtype == dx.dtype == dtype and dw.dtype == jnp.float32

  _, effective, _ = ORACLES[family](np.asarray(w_KN).T, blocks, axis)
  wide = [np.asarray(a, np.float64).reshape(10, -1) for a in (x, dy)]
  want_y, want_dx, want_dw = oracle.layer(wide[0], effective, wide[1])

  # float32 sums; in bfloat16 the result and a scaled operand are rounded.
  unit = 2.0**-24 if dtype == jnp.float32 else 2.0**-8
  for got, want, left, right in (
    (y, want_y, np.abs(wide[0]), np.abs(effective.T)),
    (dx, want_dx, np.abs(wide[1]), np.abs(effective)),
  ):
    error = np.abs(np.asarray(got, np.float64).reshape(want.shape) - want)
    assert (error <= 4 * unit * (left @ right)).all()
  bound = 4 * 2.0**-24 * (np.abs(wide[0]).T @ np.abs(wide[1]))
  assert (np.abs(np.asarray(dw) - want_dw.T) <= bound).all()


def test_nan_latents_reach_the_output():
  w_KN = jnp.ones((4, 2)).at[0, 0].set(jnp.nan)
  y = layers.straight_through_matmul(jnp.ones((1, 4)), w_KN, family='ternary')
  assert np.isnan(y).all()
