# SPDX-License-Identifier: Apache-2.0
"""Latent weights to codes and scales (Spectra, arXiv 2407.12327, 3.1 and A.1).

  gamma = eps + mean|W|,   codes = round(clip(W / gamma, -1, 1))   (ternary)
  alpha = mean|W|,         codes = sign(W - mean(W))               (binary)

BitNet b1.58 has max(eps, mean|W|) for gamma: `floor`.

The mean is taken over a scale block: one of `blocks` equal runs of outputs
(scale_axis 'out') or of inputs ('in'). Float addition is not associative, so a
float mean would depend on how a mesh splits the matrix. Here it is an integer
sum, exact in any order: equal latents give equal codes and scales on every
mesh, to the bit.

Defined corners: round is half to even, so |W| = gamma / 2 gives code 0; an
all-zero block has scale eps and codes 0 (binary: scale 0, codes 1); a block
with a NaN or an infinity has scale NaN and codes 0, so that its outputs are
NaN.

Shapes: K inputs, N outputs, S scale blocks; `n` is the blocked axis.
"""

from collections.abc import Callable
import functools
from typing import Literal

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8

ScaleAxis = Literal['out', 'in']
Family = Literal['ternary', 'binary', 'float']

EPS = 1e-5  # part of the scale, not only of the divisor (Spectra A.1)

# |value| < 2^23 after scaling to the block's largest exponent; a limb of 12
# bits summed over 2^19 entries, then 16 bits of that over 2^15, stay in int32.
_MAX_REDUCED = 2**19
_MAX_BLOCK = 2**15


def per_entry(
  scale_S: Float32[Array, ' S'], length: int
) -> Float32[Array, ' n']:
  """Repeats each block's scale over the block's share of an axis."""
  return jnp.repeat(scale_S, length // scale_S.shape[0])


def _spread(values_S, K: int, N: int, axis: ScaleAxis):
  """A value a block, shaped to broadcast over a [K, N] matrix."""
  if axis == 'out':
    return per_entry(values_S, N)[None, :]
  return per_entry(values_S, K)[:, None]


def check_blocks(shape: tuple[int, int], blocks: int, axis: ScaleAxis):
  """Raises ValueError unless `blocks` scales fit a [K, N] matrix."""
  inputs, outputs = shape
  length, reduced = (outputs, inputs) if axis == 'out' else (inputs, outputs)
  if blocks < 1 or length % blocks:
    raise ValueError(
      f'scale_blocks={blocks} does not divide the {axis} axis of length '
      f'{length}; choose a divisor'
    )
  if length // blocks > _MAX_BLOCK or reduced > _MAX_REDUCED:
    raise ValueError(
      f'a scale block of {length // blocks} x {reduced} is larger than '
      f'{_MAX_BLOCK} x {_MAX_REDUCED}, past which the exact mean would '
      'overflow; use more scale_blocks'
    )


def _block_mean(
  v_KN: Float32[Array, 'K N'], blocks: int, axis: ScaleAxis
) -> Float32[Array, ' S']:
  """Mean of each scale block, the same bits in whatever order it is summed.

  Each value becomes a 24-bit integer on the grid of its block's largest
  exponent: the rounding is below 2^-24 of the block's largest value.
  """
  reduced = 0 if axis == 'out' else 1
  # As integers, the bits of |v| are in the order of |v|, with NaN the largest;
  # a float maximum drops NaN on some backends.
  bits_KN = lax.bitcast_convert_type(jnp.abs(v_KN), jnp.int32)
  peak_n = jnp.max(bits_KN, axis=reduced)
  exponent_S = jnp.max(peak_n.reshape(blocks, -1), axis=1) >> 23
  finite_S = exponent_S < 255  # NaN and infinity have all exponent bits set
  # 2^(149 - exponent), at most 2^90: finer values cannot matter beside eps.
  grid_S = lax.bitcast_convert_type(
    (276 - jnp.clip(exponent_S, 59, 254)) << 23, jnp.float32
  )
  grid_n = per_entry(grid_S, peak_n.shape[0])
  grid_KN = jnp.expand_dims(grid_n, reduced)
  integer_KN = jnp.round(v_KN * grid_KN).astype(jnp.int32)

  total_S = jnp.zeros((blocks,), jnp.float32)
  for limb_KN, weight in (
    (integer_KN >> 12, 2.0**12),
    (integer_KN & 0xFFF, 1.0),
  ):
    sum_Sn = jnp.sum(limb_KN, axis=reduced).reshape(blocks, -1)
    high_S = jnp.sum(sum_Sn >> 16, axis=1).astype(jnp.float32)
    low_S = jnp.sum(sum_Sn & 0xFFFF, axis=1).astype(jnp.float32)
    # Factors are powers of two: the products are exact, so a fused
    # multiply-add, where a compiler forms one, changes nothing.
    total_S += high_S * (weight * 2.0**16) + low_S * weight

  # Divided by a variable, grid_S being one: XLA turns division by a constant
  # into a product, in some programs and not in others.
  mean_S = total_S / (grid_S * jnp.float32(v_KN.size // blocks))
  return jnp.where(finite_S, mean_S, jnp.nan)


def ternarize(
  w_KN: Float32[Array, 'K N'],
  blocks: int = 1,
  axis: ScaleAxis = 'out',
  *,
  floor: bool = False,
) -> tuple[Int8[Array, 'K N'], Float32[Array, ' S']]:
  """Codes in {-1, 0, 1} and one scale a block (Spectra 3.1; eps of A.1).

  With `floor`, eps is the least that a scale can be, and is not added to it.

  Raises:
    ValueError: `blocks` does not divide the axis, or a block is too large.
  """
  K, N = w_KN.shape
  check_blocks((K, N), blocks, axis)
  mean_S = _block_mean(jnp.abs(w_KN), blocks, axis)
  scale_S = jnp.maximum(mean_S, EPS) if floor else EPS + mean_S
  codes_KN = jnp.round(jnp.clip(w_KN / _spread(scale_S, K, N, axis), -1, 1))
  codes_KN = jnp.where(jnp.isnan(codes_KN), 0.0, codes_KN)
  return codes_KN.astype(jnp.int8), scale_S


def binarize(
  w_KN: Float32[Array, 'K N'], blocks: int = 1, axis: ScaleAxis = 'out'
) -> tuple[Int8[Array, 'K N'], Float32[Array, ' S']]:
  """Codes in {-1, 1} and one scale a block: Spectra's BiLM control.

  Raises:
    ValueError: `blocks` does not divide the axis, or a block is too large.
  """
  K, N = w_KN.shape
  check_blocks((K, N), blocks, axis)
  scale_S = _block_mean(jnp.abs(w_KN), blocks, axis)
  mean_S = _block_mean(w_KN, blocks, axis)
  mean_KN = _spread(mean_S, K, N, axis)
  # sign(0) is taken as +1: a binary code has no zero.
  codes_KN = jnp.where(w_KN >= mean_KN, 1, -1)
  codes_KN = jnp.where(jnp.isnan(mean_KN), 0, codes_KN)
  return codes_KN.astype(jnp.int8), scale_S


@functools.cache  # one object, so that JAX knows it again
def quantizer(family: Family, *, floor: bool = False) -> Callable:
  """`ternarize` or `binarize`; `floor` is for the former."""
  if family == 'ternary':
    return functools.partial(ternarize, floor=floor)
  return binarize


def dequantize(
  codes_KN: Int8[Array, 'K N'],
  scale_S: Float32[Array, ' S'],
  axis: ScaleAxis,
) -> Float[Array, 'K N']:
  """scale * codes, the matrix that the forward pass multiplies by."""
  K, N = codes_KN.shape
  return codes_KN * _spread(scale_S, K, N, axis)
