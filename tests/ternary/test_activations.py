# SPDX-License-Identifier: Apache-2.0
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ternary import oracle
from tritera_jax.ternary import activations, layers


def test_levels_by_hand():
  x = jnp.asarray([
    [127.0, 0.5, 1.5, 2.5, -0.5, -126.6],  # steps of 1, ties to even
    [-2.0, 1.0, 0.007, 0.008, 0.0, 2.0],  # of 2 / 127
    [4e-6, -1e-6, 1e-8, 0.0, 0.0, 0.0],  # of 1e-5 / 127: absmax counts as 1e-5
    [0.0] * 6,
  ])  # fmt: skip
  levels = np.array([
    [127, 0, 2, 2, 0, -127],
    [-127, 64, 0, 1, 0, 127],
    [51, -13, 0, 0, 0, 0],
    [0] * 6,
  ])  # fmt: skip
  want = levels * np.array([[127.0], [2.0], [1e-5], [1e-5]]) / 127
  got = activations.int8_straight_through(x)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_layer_and_its_gradients_are_the_equations(dtype):
  rng = np.random.default_rng(0)
  layer = layers.QuantizedLinear(
    96, 48, family='ternary', scale_blocks=2, scale_axis='in',
    axes=('heads', 'embed'), init_std=0.02, rngs=nnx.Rngs(params=0),
  )  # fmt: skip
  layer.activation_bits = 8
  x = jnp.asarray(rng.standard_normal((10, 96)), dtype)
  dy = jnp.asarray(rng.standard_normal((10, 48)), dtype)
  graph, state = nnx.split(layer)
  y, pullback = jax.vjp(lambda x, state: nnx.merge(graph, state)(x), x, state)
  dx, dw = pullback(dy)
  dw = dw['kernel'][...]
  assert y.dtype == dx.dtype == dtype and dw.dtype == jnp.float32

  wide_x, wide_dy = (np.asarray(a, np.float64) for a in (x, dy))
  _, effective, _ = oracle.ternary(np.asarray(layer.kernel[...]).T, 2, 'in')
  rounded = oracle.int8(wide_x)
  want = oracle.layer(rounded, effective, wide_dy)
  unit = 2.0**-24 if dtype == jnp.float32 else 2.0**-8
  for got, wanted, terms in (
    (y, want[0], np.abs(rounded) @ np.abs(effective.T)),
    (dx, want[1], np.abs(wide_dy) @ np.abs(effective)),
    (dw.T, want[2], np.abs(wide_dy).T @ np.abs(rounded)),
  ):
    error = np.abs(np.asarray(got, np.float64) - wanted)
    assert (error <= 6 * unit * terms).all()


def test_the_norm_without_gain():
  x = np.random.default_rng(0).standard_normal((3, 64)) * [[1], [1e-3], [50]]
  want = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
  got = activations.rms_normalized(jnp.asarray(x, jnp.float32), 1e-5)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_nan_is_not_rounded_away():
  x = jnp.ones((1, 4)).at[0, 2].set(jnp.nan)
  assert np.isnan(activations.int8_straight_through(x)[0, 2])
