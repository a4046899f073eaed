# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): inputs are rounded one after the other, and those
that remain make up for the error.

With G = sum x x^T of what a layer was given and U the upper Cholesky factor of
the damped G's inverse (U^T U = G^-1), the paper's algorithm 1 rounds row k of W
and subtracts U[k, j] (w_k - q_k) / U[k, k] from every later row j. (Its H is
2 G; the factor changes nothing.)

Of the choices that the paper or its authors' code leave open, ours: inputs in
their own order (no act-order; Spectra does not say what QuantLM did), and a
group's scale is found when its turn comes, from weights that earlier errors
have already changed, as in the paper's section 5.

NumPy in float64. Shapes: K inputs, N outputs.
"""

from jaxtyping import Float, Float64
import numpy as np
import scipy.linalg

from tritera_jax.quantlm import uniform
from tritera_jax.quantlm.uniform import Grid, Quantized

_BLOCK = 128  # rows whose errors reach later blocks in one product


def factor(
  gram_KK: Float[np.ndarray, 'K K'], damping: float
) -> Float64[np.ndarray, 'K K']:
  """U of the module's text.

  Args:
    gram_KK: sum of x x^T.
    damping: added to the diagonal, as a share of its mean; the paper's is 0.01.

  Raises:
    ValueError: the sum is zero, not finite, or singular in spite of damping.
  """
  damped_KK = gram_KK.astype(np.float64)
  mean = damped_KK.trace() / len(damped_KK)
  damped_KK[np.diag_indices_from(damped_KK)] += damping * mean
  try:
    # With G = R R^T, R upper (Cholesky's factor from the last row upwards),
    # G^-1 = R^-T R^-1: U is the inverse of R, and G's is never formed.
    upper_KK = np.linalg.cholesky(damped_KK[::-1, ::-1])[::-1, ::-1]
    pivots_K = upper_KK.diagonal() ** 2
    rounding = len(pivots_K) * np.finfo(np.float64).eps * pivots_K.max()
    if not pivots_K.min() > rounding:  # nor NaN
      raise np.linalg.LinAlgError
  except np.linalg.LinAlgError:
    raise ValueError(
      f'damping={damping}: the calibration inputs span too few of their '
      f'{len(gram_KK)} dimensions, or are not finite; raise damping or the '
      'number of samples'
    ) from None
  return scipy.linalg.solve_triangular(
    upper_KK, np.eye(len(upper_KK)), lower=False
  )


def gptq(
  w_KN: Float[np.ndarray, 'K N'],
  factor_KK: Float64[np.ndarray, 'K K'],
  grid: Grid,
) -> Quantized:
  """The matrix on the grid, with errors fed forward.

  Args:
    w_KN: weights.
    factor_KK: of `factor`, for the inputs of this matrix.
    grid: values that a weight can take.

  Raises:
    ValueError: the group does not divide the inputs, or see `uniform.fit`.
  """
  w_KN = w_KN.astype(np.float64)
  K, N = w_KN.shape
  group = grid.group_of(K)
  # A block never holds a part of a group: its range takes in all errors so far.
  block = _BLOCK if group == K else group
  codes_KN = np.empty((K, N), np.uint8)
  scales, zeros = [], []
  for first in range(0, K, block):
    stop = min(first + block, K)
    if first % group == 0:
      scale_N, zero_N = uniform.fit(w_KN[first : first + group], grid)
      scales.append(scale_N)
      zeros.append(zero_N)
    error_bN = np.empty((stop - first, N))
    for k in range(first, stop):
      codes_KN[k] = uniform.encode(w_KN[k], scales[-1], zeros[-1], grid)
      rounded_N = uniform.decode(codes_KN[k], scales[-1], zeros[-1])
      error_bN[k - first] = (w_KN[k] - rounded_N) / factor_KK[k, k]
      w_KN[k + 1 : stop] -= np.outer(
        factor_KK[k, k + 1 : stop], error_bN[k - first]
      )
    w_KN[stop:] -= factor_KK[first:stop, stop:].T @ error_bN
  return Quantized(codes_KN, np.stack(scales), np.stack(zeros))
