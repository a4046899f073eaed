# SPDX-License-Identifier: Apache-2.0
"""Matrices on uniform grids, by rounding to nearest.

  code = clip(round(w / scale) + zero, 0, 2^bits - 1),   w ~ scale (code - zero)

A scale and a zero belong to a group: neighbouring inputs of one output. They
cover the group's range, as in GPTQ's experiments (arXiv 2210.17323, section 5),
with 0 in it, so that 0 has a code; of a symmetric grid, as QuantLM's are
(Spectra, arXiv 2407.12327), it is the same on both sides of 0. Scales are
float16 numbers, being counted as 16 bits; they are rounded up, so that no
weight of the group is more than half a step from its code's.

NumPy, for this is done once. Shapes: K inputs, N outputs, S groups, g inputs of
a group.
"""

import dataclasses
from typing import NamedTuple

from jaxtyping import Float, Float16, UInt8
import numpy as np


@dataclasses.dataclass(frozen=True)
class Grid:
  """What values a quantised weight can take.

  Attributes:
    bits: of a code, from 2 to 8.
    group: neighbouring inputs of an output that share a scale; None: all.
    symmetric: 0 is the middle code, and no zero is needed.
  """

  bits: int
  group: int | None
  symmetric: bool

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise ValueError(f'bits={self.bits} must lie in 2..8')
    if self.group is not None and self.group < 1:
      raise ValueError(f'group={self.group} must be >= 1, or None for one')

  @property
  def bits_per_weight(self) -> float:
    """As the papers count: 32 bits a group for scale and zero (Spectra, Table
    4: 4.25 and 3.25 bits), of whole columns nothing (8 and 6 bits)."""
    return self.bits + (32 / self.group if self.group else 0.0)

  def group_of(self, inputs: int) -> int:
    """Inputs of a group of a matrix with so many.

    Raises:
      ValueError: it does not divide them.
    """
    group = self.group or inputs
    if inputs % group:
      raise ValueError(
        f'group={group} does not divide the {inputs} inputs of the matrix; '
        'choose a divisor, or None for one group'
      )
    return group


class Quantized(NamedTuple):
  """A matrix on a grid, and what its codes are codes of."""

  codes_KN: UInt8[np.ndarray, 'K N']
  scale_SN: Float16[np.ndarray, 'S N']
  zero_SN: UInt8[np.ndarray, 'S N']

  def dequantize(self) -> Float[np.ndarray, 'K N']:
    """scale (code - zero), float32."""
    group = len(self.codes_KN) // len(self.scale_SN)
    scale_KN, zero_KN = (
      np.repeat(array, group, axis=0) for array in (self.scale_SN, self.zero_SN)
    )
    return decode(self.codes_KN, scale_KN, zero_KN).astype(np.float32)


def fit(
  w_gN: Float[np.ndarray, 'g N'], grid: Grid
) -> tuple[Float16[np.ndarray, ' N'], UInt8[np.ndarray, ' N']]:
  """Scale and zero of one group for each output.

  Raises:
    ValueError: a weight is not finite, or past float16's largest scale.
  """
  low_N, high_N = np.minimum(w_gN.min(0), 0), np.maximum(w_gN.max(0), 0)
  if grid.symmetric:
    high_N = np.maximum(-low_N, high_N)
    low_N = -high_N
  exact_N = (high_N - low_N) / (2**grid.bits - 1)
  with np.errstate(over='ignore'):
    scale_N = exact_N.astype(np.float16)
  scale_N = np.where(
    scale_N < exact_N, np.nextafter(scale_N, np.float16(np.inf)), scale_N
  )
  if not np.isfinite(scale_N).all():
    raise ValueError(
      f'weights from {low_N.min():.3g} to {high_N.max():.3g} have no float16 '
      'scale; the model is damaged or diverged'
    )
  scale_N = np.where(scale_N > 0, scale_N, np.float16(1))  # all are 0
  if grid.symmetric:
    return scale_N, np.full(scale_N.shape, 2 ** (grid.bits - 1), np.uint8)
  return scale_N, np.round(-low_N / scale_N).astype(np.uint8)


def encode(w, scale, zero, grid: Grid) -> UInt8[np.ndarray, '...']:
  """Codes of weights, which are clipped to the grid."""
  codes = np.round(w / scale) + zero
  return np.clip(codes, 0, 2**grid.bits - 1).astype(np.uint8)


def decode(codes, scale, zero) -> Float[np.ndarray, '...']:
  """The weights that codes stand for, float64."""
  return scale.astype(np.float64) * (codes.astype(np.float64) - zero)


def round_to_nearest(w_KN: Float[np.ndarray, 'K N'], grid: Grid) -> Quantized:
  """Each weight to the nearest value of its group's grid.

  Raises:
    ValueError: the group does not divide the inputs, or see `fit`.
  """
  group = grid.group_of(len(w_KN))
  parts = []
  for first in range(0, len(w_KN), group):
    w_gN = w_KN[first : first + group].astype(np.float64)
    scale_N, zero_N = fit(w_gN, grid)
    parts.append((encode(w_gN, scale_N, zero_N, grid), scale_N, zero_N))
  codes, scales, zeros = zip(*parts, strict=True)
  return Quantized(np.concatenate(codes), np.stack(scales), np.stack(zeros))
