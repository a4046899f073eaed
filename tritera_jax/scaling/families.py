# SPDX-License-Identifier: Apache-2.0
"""Ternary against float: at equal parameters, and at equal bytes served."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools

import numpy as np

from tritera_jax.scaling.costs import Serving, Shapes
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.plan import Array, Fitted, interval

FURTHEST = 64.0  # times the largest model that families are compared to
_ROWS = 7


@dataclasses.dataclass(frozen=True)
class Crossing:
  """Where two families have one loss, as something grows.

  Attributes:
    at: what grows there, its last crossing; None where they do not cross.
    loss: nats a token there.
    before: the family with the lower loss before it, or all along.
    after: the one after it.
    share: of draws that cross at all, which `at`'s interval is of.
    count: crossings of the best fit; `before` is since the last but one.
  """

  at: Interval | None
  loss: float | None
  before: str
  after: str
  share: float
  count: int


def crossing(grows: Array, losses: Mapping[str, Array]) -> Crossing:
  """The last place in a table where the losses of two families cross.

  A draw that crosses several times counts where it is nearest to that place.

  Args:
    grows: parameters or bytes (X,), rising: dense enough to interpolate its
      logarithm linearly.
    losses: of the two families (1 + K, X), as `Fitted.table` gives them.
  """
  one, other = losses
  apart = losses[one] - losses[other]
  x = np.log(grows)
  roots, *drawn = (_roots(x, row) for row in apart)
  crossed = [each for each in drawn if len(each)]
  share = len(crossed) / max(len(drawn), 1)
  after = one if apart[0, -1] < 0 else other
  if not len(roots):
    return Crossing(None, None, after, after, share, 0)
  at = roots[-1]
  near = [each[np.argmin(abs(each - at))] for each in crossed]
  return Crossing(
    interval(np.exp([at, *near])),
    float(np.interp(at, x, losses[one][0])),
    other if after == one else one,
    after,
    share,
    len(roots),
  )


def _roots(x: Array, y: Array) -> Array:
  k = np.flatnonzero(np.signbit(y[1:]) != np.signbit(y[:-1]))
  return x[k] - y[k] * (x[k + 1] - x[k]) / (y[k + 1] - y[k])


@dataclasses.dataclass(frozen=True)
class Row:
  """Two families at one number of parameters, or of bytes served.

  Attributes:
    at: the number.
    losses: nats a token, by family.
    wins: share of draws in which the first has the lower loss.
    beyond: how many times outside the runs the further family is.
  """

  at: float
  losses: dict[str, Interval]
  wins: float
  beyond: float


@dataclasses.dataclass(frozen=True)
class Compared:
  """Two families as something grows.

  Attributes:
    rows: from the smallest model of both to FURTHEST beyond the largest.
    crossing: the last between them.
  """

  rows: list[Row]
  crossing: Crossing


def common_tokens(families: Iterable[Fitted]) -> float:
  """The most tokens that a run of every size of every family has seen."""
  return min(
    float(np.max(np.asarray(each.tokens)[np.asarray(each.parameters) == N]))
    for each in families
    for N in np.unique(each.parameters)
  )


def compare(
  pair: Mapping[str, Fitted], shapes: Shapes, serving: Serving, tokens: float
) -> dict[str, Compared]:
  """Two families after so many tokens, as 'parameters' or 'bytes' grow."""

  def cost(what: str, family: str, N):
    return N if what == 'parameters' else serving.bytes(family, shapes, N)

  compared = {}
  for what in ('parameters', 'bytes'):
    costs = {name: functools.partial(cost, what, name) for name in pair}
    low = max(float(costs[n](f.sizes[0])) for n, f in pair.items())
    high = FURTHEST * min(float(costs[n](f.sizes[1])) for n, f in pair.items())
    grid = np.geomspace(low, high, 200 * (_ROWS - 1) + 1)
    sizes = {
      name: np.asarray(shapes.invert(costs[name], grid)) for name in pair
    }
    losses = {name: pair[name].table(sizes[name], tokens) for name in pair}
    one, other = losses.values()
    won = (one < other)[min(1, len(one) - 1) :].mean(0)
    compared[what] = Compared(
      [
        Row(
          float(grid[k]),
          {name: interval(table[:, k]) for name, table in losses.items()},
          float(won[k]),
          max(float(pair[n].beyond(sizes[n][k], tokens)) for n in pair),
        )
        for k in range(0, len(grid), 200)
      ],
      crossing(grid, losses),
    )
  return compared
