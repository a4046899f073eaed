# SPDX-License-Identifier: Apache-2.0
"""ByteMatrix: an int8 matrix with one scale a row, for head and embedding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int
import numpy as np

OFFSET = 128  # byte = int8 weight + 128
# A row below it counts as all zero, as a token does in `matmul.reference`.
SMALLEST_ABSMAX = 1e-30
_PART = 1 << 22  # weights rounded together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByteMatrix:
  """A matrix of N rows and K columns, near scale[n] * (data[n, k] - 128).

  Invariants (`check` tests them on the host): no byte is 0, as weights lie in
  -127..127; scales are finite and not negative.

  Attributes:
    data: uint8 [N, K], the int8 weights + 128.
    scale: float32 [N].
  """

  # Any: as a pytree it may also hold shapes, shardings or tracers.
  data: Any
  scale: Any

  @property
  def shape(self) -> tuple[int, int]:
    return self.data.shape

  @property
  def nbytes(self) -> int:
    """Stored bytes, scales included."""
    return self.data.nbytes + self.scale.nbytes


def quantize_rows(w_NK: Float[Array | np.ndarray, 'N K']) -> ByteMatrix:
  """Rounds each row to integers of its absmax / 127, half to even. On the host.

  A row with absmax < 1e-30 is zeros with scale 0.

  Raises:
    ValueError: a NaN or an infinity: which entry.
  """
  w_NK = np.asarray(w_NK, np.float32)
  N, K = w_NK.shape
  data_NK = np.empty((N, K), np.uint8)
  scale_N = np.empty(N, np.float32)
  # In parts: of a head, temporaries are gigabytes.
  rows = max(1, _PART // max(1, K))
  for first in range(0, N, rows):
    part = slice(first, first + rows)
    w_nK = w_NK[part]
    absmax_n = np.abs(w_nK).max(axis=1)
    if not np.isfinite(absmax_n).all():
      n, k = np.argwhere(~np.isfinite(w_nK))[0]
      raise ValueError(f'w_NK[{first + n}, {k}]={w_nK[n, k]} must be finite')
    zero_n = absmax_n < SMALLEST_ABSMAX
    usable_n = np.where(zero_n, np.float32(1), absmax_n)
    q_nK = np.rint(w_nK * (np.float32(127) / usable_n)[:, None])
    q_nK[zero_n] = 0
    data_NK[part] = q_nK + OFFSET
    scale_N[part] = np.where(zero_n, np.float32(0), usable_n / np.float32(127))
  return ByteMatrix(jnp.asarray(data_NK), jnp.asarray(scale_N))


def dequantize(matrix: ByteMatrix) -> Float32[Array, 'N K']:
  """The float32 matrix; traceable."""
  return _floats(matrix.data, matrix.scale)


def rows(
  matrix: ByteMatrix, ids: Int[Array, '*batch']
) -> Float32[Array, '*batch K']:
  """The float32 rows of `ids`: an embedding; traceable."""
  return _floats(matrix.data[ids], matrix.scale[ids])


def _floats(data, scale):
  return (data.astype(jnp.float32) - OFFSET) * scale[..., None]


def check_layout(matrix: ByteMatrix):
  """Tests shapes and dtypes: cheap, and fit for tracing.

  Raises:
    ValueError: the field, its value and what was wanted.
  """
  shape = matrix.data.shape
  if len(shape) != 2 or min(shape) < 1 or matrix.data.dtype != jnp.uint8:
    raise ValueError(
      f'data is {matrix.data.dtype}{list(shape)}, wanted uint8[N, K] of one '
      'row and column at least'
    )
  N = matrix.shape[0]
  if matrix.scale.shape != (N,) or matrix.scale.dtype != jnp.float32:
    raise ValueError(
      f'scale is {matrix.scale.dtype}{list(matrix.scale.shape)}, wanted '
      f'float32[{N}]'
    )


def check(matrix: ByteMatrix):
  """Tests every invariant on the host: for what came from a file.

  Raises:
    ValueError: the field, its value and what was wanted.
  """
  check_layout(matrix)
  scale_N, data_NK = np.asarray(matrix.scale), np.asarray(matrix.data)
  wrong_N = ~(np.isfinite(scale_N) & (scale_N >= 0))
  if wrong_N.any():
    n = int(np.argmax(wrong_N))
    raise ValueError(f'scale[{n}]={scale_N[n]} must be finite and >= 0')
  if not data_NK.all():
    n, k = np.argwhere(data_NK == 0)[0]
    raise ValueError(f'data[{n}, {k}]=0 is no weight; the bytes are damaged')
