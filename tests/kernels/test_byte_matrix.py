# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tritera_kernels import byte_matrix


def test_rows_by_hand():
  w = np.array([[127, -126, 0.5, 1.5, 2.5], [0, 0, 0, 0, 0]], np.float32)
  matrix = byte_matrix.quantize_rows(w)
  # Half to even; and a row of nothing has a scale that multiplies to nothing.
  np.testing.assert_array_equal(
    matrix.data, [[255, 2, 128, 130, 130], [128] * 5]
  )
  np.testing.assert_array_equal(matrix.scale, [1, 0])
  byte_matrix.check(matrix)


@pytest.mark.parametrize('size', [1e-34, 1e-3, 1e37])
def test_the_error_is_half_a_step_of_its_row(size):
  rng = np.random.default_rng(0)
  w = (size * rng.standard_normal((7, 33))).astype(np.float32)
  matrix = byte_matrix.quantize_rows(w)
  byte_matrix.check(matrix)
  step = np.abs(w).max(1, keepdims=True) / 127
  error = np.abs(np.asarray(byte_matrix.dequantize(matrix)) - w)
  assert (error <= 0.5001 * np.maximum(step, 1e-30)).all()


def test_rows_of_ids_are_those_of_the_whole():
  w = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
  matrix = byte_matrix.quantize_rows(w)
  ids = jnp.array([[3, 0, 8], [8, 8, 1]])
  got = jax.jit(byte_matrix.rows)(matrix, ids)
  np.testing.assert_array_equal(got, byte_matrix.dequantize(matrix)[ids])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
  w = np.ones((3, 4), np.float32)
  w[2, 1] = bad
  with pytest.raises(ValueError, match=r'w_NK\[2, 1\]=(nan|inf) must be fin'):
    byte_matrix.quantize_rows(w)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'data': jnp.zeros((3, 4), jnp.uint8)}, r'data\[0, 0\]=0 is no weight'),
    ({'data': jnp.ones((3, 4), jnp.int8)}, r'data is int8\[3, 4\], wanted'),
    ({'scale': jnp.ones(4)}, r'scale is float32\[4\], wanted float32\[3\]'),
    ({'scale': jnp.array([1.0, -1, 1])}, r'scale\[1\]=-1.0 must be finite'),
    ({'scale': jnp.array([1.0, 1, jnp.nan])}, r'scale\[2\]=nan must be finite'),
  ],
)
def test_a_broken_invariant_is_named(change, message):
  matrix = byte_matrix.quantize_rows(np.ones((3, 4), np.float32))
  with pytest.raises(ValueError, match=message):
    byte_matrix.check(dataclasses.replace(matrix, **change))
