# SPDX-License-Identifier: Apache-2.0
"""Zero-sum learning (arXiv 2506.05447): what tokens take from one another.

Of what N tokens each want, x_i (changes of their losses, or gradients in one
coordinate), destructive interference is D = 1 - |sum x| / sum |x|, magnitude
M = mean |x|, and what is left of it |mean x| = M (1 - D).
"""

import math
from typing import NamedTuple

import numpy as np


class Interference(NamedTuple):
  """Of changes x_i; D is NaN where nothing changed."""

  D: float
  M: float
  change: float


def interference(changes) -> Interference:
  """D, M and mean of changes [N], such as those of N tokens' losses."""
  changes = np.asarray(changes, np.float64)
  magnitude, mean = np.abs(changes).mean(), changes.mean()
  D = 1 - abs(mean) / magnitude if magnitude else math.nan
  return Interference(float(D), float(magnitude), float(mean))


class GradientInterference(NamedTuple):
  """Of per-token gradients, by coordinate.

  Attributes:
    D: mean of D_j over the coordinates j that have a gradient.
    histogram: how many have 1 - D_j in each hundredth of [0, 1], [100].
  """

  D: float
  histogram: np.ndarray


def gradient_interference(sums, absolutes) -> GradientInterference:
  """From sum_i g_ij and sum_i |g_ij|, each [P]."""
  absolutes = np.asarray(absolutes, np.float64)
  some = absolutes > 0
  left = np.abs(np.asarray(sums, np.float64)[some]) / absolutes[some]
  # Rounding in the sums may leave more than there was.
  left = np.minimum(left, 1.0)
  D = 1 - left.mean() if left.size else math.nan
  return GradientInterference(
    float(D), np.histogram(left, bins=100, range=(0, 1))[0]
  )


class Projections(NamedTuple):
  """What is left of the tokens' p_ij = g_ij dtheta_j, as shares of 1.

  Attributes:
    Cg: sum_j |sum_i p| / sum_ij |p|: of what tokens want of a coordinate.
    Cug: sum_i |sum_j p| / sum_ij |p|: of what coordinates do for a token.
    CuG: |sum p| / sum_j |sum_i p|: of what coordinates do for all tokens.
    Ci: |sum p| / sum_i |sum_j p| = Cg CuG / Cug: of what tokens gain; 1 - D
      of their changes of loss to first order.
  """

  Cg: float
  Cug: float
  CuG: float
  Ci: float


def projections(sums, absolutes, update, predicted) -> Projections:
  """From sums over N tokens, and over P coordinates for each token.

  Args:
    sums: sum_i g_ij [P].
    absolutes: sum_i |g_ij| [P].
    update: dtheta_j [P].
    predicted: sum_j g_ij dtheta_j [N].
  """
  sums, absolutes, update, predicted = (
    np.asarray(a, np.float64) for a in (sums, absolutes, update, predicted)
  )
  by_coordinate = np.abs(sums * update).sum()
  by_token = np.abs(predicted).sum()
  each = (absolutes * np.abs(update)).sum()
  # Of both sums of all p the token's is what losses are compared with.
  whole = abs(predicted.sum())
  with np.errstate(
    invalid='ignore', divide='ignore'
  ):  # without an update nothing is left
    return Projections(
      *(
        float(np.float64(over) / under)
        for over, under in (
          (by_coordinate, each),
          (by_token, each),
          (whole, by_coordinate),
          (whole, by_token),
        )
      )
    )
