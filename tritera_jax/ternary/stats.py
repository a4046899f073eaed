# SPDX-License-Identifier: Apache-2.0
"""What ternary weights do while they train."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8

from tritera_jax.ternary import quantize
from tritera_jax.ternary.quantize import ScaleAxis


def matrix_stats(
  w_KN: Float32[Array, 'K N'],
  before_KN: Int8[Array, 'K N'],
  scale_before_S: Float32[Array, ' S'],
  axis: ScaleAxis,
  *,
  floor: bool = False,
) -> dict[str, Float32[Array, '']]:
  """Statistics of one ternary matrix against one update before.

  Returns: zero_fraction: share of codes that are 0; flip_fraction: share of
  codes that the update changed; near_threshold: share of latents within
  10 % of the threshold scale / 2; scale: mean of the blocks' scales;
  scale_drift: mean of |scale / scale before - 1|.
  """
  blocks = scale_before_S.shape[0]
  codes_KN, scale_S = quantize.ternarize(w_KN, blocks, axis, floor=floor)
  ones_KN = jnp.ones_like(codes_KN)
  threshold_KN = quantize.dequantize(ones_KN, scale_S, axis) / 2
  near_KN = jnp.abs(jnp.abs(w_KN) - threshold_KN) < 0.1 * threshold_KN
  return {
    'zero_fraction': jnp.mean(codes_KN == 0),
    'flip_fraction': jnp.mean(codes_KN != before_KN),
    'near_threshold': jnp.mean(near_KN),
    'scale': jnp.mean(scale_S),
    'scale_drift': jnp.mean(jnp.abs(scale_S / scale_before_S - 1)),
  }


def stacked_stats(
  w_LKN: Float32[Array, 'L K N'],
  before_LKN: Int8[Array, 'L K N'],
  scale_before_LS: Float32[Array, 'L S'],
  axis: ScaleAxis,
  *,
  floor: bool = False,
) -> dict[str, Float32[Array, '']]:
  """`matrix_stats` averaged over layers."""
  stats = jax.vmap(functools.partial(matrix_stats, axis=axis, floor=floor))(
    w_LKN, before_LKN, scale_before_LS
  )
  return jax.tree.map(jnp.mean, stats)
