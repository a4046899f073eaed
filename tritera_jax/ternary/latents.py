# SPDX-License-Identifier: Apache-2.0
"""Latents for codes and scales that are given: `quantize` backwards.

A checkpoint of ternarised weights has no latents, and a run is its latents.
Among all that round to given codes these have zeros for zeros, and for the
others the one magnitude that makes the mean what the scale asks for, to the
bit: some are one step of the mean's integer grid larger than the rest.

Shapes: K inputs, N outputs, S scale blocks.
"""

import functools

import jax
from jaxtyping import Float32, Int8, Int64
import numpy as np

from tritera_jax.ternary import quantize
from tritera_jax.ternary.quantize import EPS, ScaleAxis

# The mean is a float32 quotient of a float32 sum, each rounded: a total a few
# units in the last place off may be the one.
_TRIES = sorted(range(-16, 17), key=abs)
# How far what is made of others' scales may be off, where there are no latents:
# the quotient and, without a floor, its sum with eps are rounded, and each
# steps over values. Of 504 random ones of seven shapes 49 were one unit off,
# none more; 4 leave room, and are 2^-21 of a scale where bfloat16 rounds by
# 2^-9.
MOST_ULPS = 4


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def ternarized(w_KN, blocks, axis, floor):
  """`quantize.ternarize`, compiled."""
  return quantize.ternarize(w_KN, blocks, axis, floor=floor)


def ulps_apart(
  a_S: Float32[np.ndarray, ' S'], b_S: Float32[np.ndarray, ' S']
) -> Int64[np.ndarray, ' S']:
  """Units in the last place of a float32 between positive ones."""
  a_S, b_S = (np.asarray(x, np.float32).view(np.int32) for x in (a_S, b_S))
  return np.abs(a_S.astype(np.int64) - b_S)


def latents_of(
  codes_KN: Int8[np.ndarray, 'K N'],
  scale_S: Float32[np.ndarray, ' S'],
  axis: ScaleAxis,
  *,
  floor: bool,
  ulps: int = 0,
) -> Float32[np.ndarray, 'K N']:
  """Latents that `quantize.ternarize` takes to these codes and scales.

  A block of zeros has scale eps, whatever `scale_S` says of it: that scale
  multiplies nothing.

  Args:
    codes_KN: in {-1, 0, 1}.
    scale_S: positive; one for each of S blocks along `axis`.
    axis: 'out' (N) or 'in' (K).
    floor: as of `quantize.ternarize`. With it there are latents for every
      scale whose product with the block's size has at most 24 significant
      bits: a float16 or bfloat16 one, of matrices of usual widths. Of others,
      and of any without it, some have none.
    ulps: how many units in the last place of a float32 a scale may be off.

  Raises:
    ValueError: a code or a scale is none, the blocks do not fit, or no latents
      have such a scale: the block, the scale and the nearest one are named.
  """
  blocks, (K, N) = scale_S.shape[0], codes_KN.shape
  quantize.check_blocks((K, N), blocks, axis)
  if codes_KN.size and not -1 <= codes_KN.min() <= codes_KN.max() <= 1:
    raise ValueError(f'codes must be -1, 0 or 1, not {np.unique(codes_KN)}')
  offset = 0.0 if floor else EPS
  latents_KN = np.zeros((K, N), np.float32)
  # Views: what is written to them is written to the whole.
  split = {'out': 1, 'in': 0}[axis]
  codes = np.split(codes_KN, blocks, split)
  views = np.split(latents_KN, blocks, split)
  wanted_S = np.array(
    [s if c.any() else EPS for s, c in zip(scale_S, codes, strict=True)],
    np.float32,
  )
  for block, scale in enumerate(wanted_S):
    if not EPS <= scale < np.inf or (codes[block].any() and scale <= offset):
      raise ValueError(
        f'scale {scale} of block {block} must be finite and '
        f'{"at least" if floor else "more than"} {EPS}'
      )

  # Of each block the first try that is exact, or else the nearest.
  nearest_S = np.full(blocks, np.iinfo(np.int32).max)
  best_S = np.zeros(blocks, int)
  for away in _TRIES:
    open_S = np.flatnonzero(nearest_S)
    if not open_S.size:
      break
    for block in open_S:
      _fill(views[block], codes[block], float(wanted_S[block]) - offset, away)
    _, made_S = ternarized(latents_KN, blocks, axis, floor)
    steps_S = ulps_apart(np.asarray(made_S), wanted_S)
    best_S = np.where(steps_S < nearest_S, away, best_S)
    nearest_S = np.minimum(steps_S, nearest_S)
  for block in np.flatnonzero(nearest_S):
    mean = float(wanted_S[block]) - offset
    _fill(views[block], codes[block], mean, int(best_S[block]))
  made, made_S = ternarized(latents_KN, blocks, axis, floor)
  if nearest_S.max(initial=0) > ulps:
    block = int(np.argmax(nearest_S))
    raise ValueError(
      f'no latents have scale {wanted_S[block]} in block {block}; the '
      f'nearest is {np.asarray(made_S)[block]}: allow ulps, or use '
      'scale_floor=True'
    )
  if not np.array_equal(made, codes_KN):
    raise AssertionError('latents that round to other codes')
  return latents_KN


def _fill(view, codes, mean: float, away: int):
  """Writes latents of that mean magnitude, or `away` steps off it."""
  signs = codes[codes != 0]
  if not signs.size:
    return
  exponent = np.frexp(mean * codes.size / signs.size)[1]
  # As `quantize` does: integers of 23 bits, on the grid of the largest.
  grid = 2.0 ** (23 - exponent)
  total = round(mean * codes.size * grid)
  total += away * max(1, total >> 25)
  each, larger = divmod(total, signs.size)
  magnitude = np.full(signs.size, each, np.float64)
  magnitude[:larger] += 1
  view[codes != 0] = signs * (magnitude / grid)
