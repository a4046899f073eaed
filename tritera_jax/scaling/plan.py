# SPDX-License-Identifier: Apache-2.0
"""What a fitted law says to train next, and how far it can be trusted.

A law is a callable L(N, D) in nats a token; intervals come from draws of it,
such as a bootstrap's. What compares families takes one draw of each at a time,
by its index: draw families independently of one another.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritera_jax.scaling.costs import Serving, Shapes
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.laws import Numbers

Array = NDArray[np.float64]
Law = Callable[[Numbers, Numbers], Any]


LEVEL = 0.9  # of confidence, of every interval


def interval(values: Numbers) -> Interval:
  """Of the best fit's value and those of its draws; NaN without draws."""
  value, *draws = np.asarray(values, float)
  low, high = ends(draws or [np.nan])
  return Interval(float(value), float(low), float(high), LEVEL)


def ends(draws: Numbers) -> Array:
  """What holds LEVEL of draws (K, ...): low and high (2, ...)."""
  return np.quantile(
    np.asarray(draws, float), ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0
  )


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A law of one family and where it was fitted.

  Attributes:
    law: of the best fit.
    draws: laws that the runs would as well allow.
    parameters: N of each run (R).
    tokens: D of each run (R).
  """

  law: Law
  draws: Sequence[Law]
  parameters: Numbers
  tokens: Numbers

  def beyond(self, parameters: Numbers, tokens: Numbers) -> Any:
    """How many times outside the runs N and D are; 1: within.

    Within are those that have a run of no less N and no less D, and one of no
    more of both.
    """
    N = np.log(self.parameters) - np.log(parameters)[..., None]
    D = np.log(self.tokens) - np.log(tokens)[..., None]
    below, above = np.maximum(N, D).min(-1), np.maximum(-N, -D).min(-1)
    return np.exp(np.maximum(np.maximum(below, above), 0))

  @property
  def sizes(self) -> tuple[float, float]:
    """The smallest and the largest N fitted to."""
    return float(np.min(self.parameters)), float(np.max(self.parameters))

  @property
  def budgets(self) -> tuple[float, float]:
    """The least and the most D fitted to."""
    return float(np.min(self.tokens)), float(np.max(self.tokens))

  def largest(self, shapes: Shapes) -> tuple[float, float]:
    """N and D of the run that most FLOPs trained."""
    N, D = np.asarray(self.parameters, float), np.asarray(self.tokens, float)
    at = np.argmax(shapes.flops_per_token(N) * D)
    return float(N[at]), float(D[at])

  def table(self, parameters: Numbers, tokens: Numbers) -> Array:
    """Losses at points (X,): those of the law, then of each draw (1 + K, X)."""
    return np.array(
      [law(parameters, tokens) for law in (self.law, *self.draws)]
    )


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a model may cost; None sets no limit.

  Training compute alone bounds N and D. Limits of serving bound N; D then
  takes training compute or tokens as well.

  Attributes:
    training_flops: of one run, forward and backward.
    gpu_days: in their place, with the next two.
    gpu_flops_per_second: peak of one GPU.
    mfu: share of the peak that training reaches, 0..1.
    tokens: the most there are to train on.
    served_bytes: of packed weights, embedding and head.
    joules_per_token: of serving.
  """

  training_flops: float | None = None
  gpu_days: float | None = None
  gpu_flops_per_second: float | None = None
  mfu: float | None = None
  tokens: float | None = None
  served_bytes: float | None = None
  joules_per_token: float | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is not None and not 0 < value < float('inf'):
        raise ValueError(f'{field.name}={value} must be > 0')
    gpu = (self.gpu_days, self.gpu_flops_per_second, self.mfu)
    if None in gpu and any(gpu):
      raise ValueError(
        f'gpu_days={gpu[0]}, gpu_flops_per_second={gpu[1]} and mfu={gpu[2]} '
        'go together: give all three'
      )
    if self.mfu is not None and self.mfu > 1:
      raise ValueError(f'mfu={self.mfu} must be <= 1: a share of the peak')
    if self.gpu_days is not None and self.training_flops is not None:
      raise ValueError(
        f'training_flops={self.training_flops:g} and gpu_days={self.gpu_days:g}'
        ' are the same limit twice: give one'
      )

    if any(value is not None for value in vars(self).values()):
      self.refuse_without_bound()

  def refuse_without_bound(self):
    """Raises a ValueError where N or D may be whatever it likes."""
    serves = (self.served_bytes, self.joules_per_token) != (None, None)
    if self.flops == np.inf and not (serves and self.tokens):
      raise ValueError(
        'a budget needs training_flops or gpu_days, or tokens with '
        'served_bytes or joules_per_token: else N or D has no bound'
      )

  @property
  def flops(self) -> float:
    """Of training; inf without a limit."""
    if self.gpu_days is not None:
      assert self.gpu_flops_per_second is not None and self.mfu is not None
      return self.gpu_days * 86_400 * self.gpu_flops_per_second * self.mfu
    return np.inf if self.training_flops is None else self.training_flops


@dataclasses.dataclass(frozen=True)
class Choice:
  """The best model of a family within a budget.

  Attributes:
    family: of its weights.
    parameters: N, as the law counts.
    tokens: D.
    loss: nats a token, of the best N and D of each draw.
    training_flops: of the best fit's N and D.
    served_bytes: of its weights.
    joules_per_token: of serving it.
    beyond: how many times outside the runs it is; 1: within.
    wins: share of the draws in which no family has a lower loss.
  """

  family: str
  parameters: Interval
  tokens: Interval
  loss: Interval
  training_flops: float
  served_bytes: float
  joules_per_token: float
  beyond: float
  wins: float


def best(
  families: Mapping[str, Fitted],
  budget: Budget,
  shapes: Shapes,
  serving: Serving = Serving(),
) -> list[Choice]:
  """The best model of each family within a budget, the best family first.

  A family that has no model so small is left out.

  Raises:
    ValueError: the budget leaves N or D without a bound, or no family has a
      model so small.
  """
  budget.refuse_without_bound()
  found, refused = {}, []
  for family, fitted in families.items():
    try:
      largest = _largest(family, budget, shapes, serving)
    except ValueError as error:
      refused.append(str(error))
      continue
    found[family] = np.array(
      [
        np.ravel(_best(law, largest, budget.flops, budget.tokens, shapes))
        for law in (fitted.law, *fitted.draws)
      ]
    ).T
  if not found:
    raise ValueError('; '.join(refused))
  count = min(each.shape[1] for each in found.values())
  least = np.min([each[2, :count] for each in found.values()], axis=0)
  choices = []
  for family, (N, D, loss) in found.items():
    # The best fit is no draw, unless there is nothing else.
    won = (loss[:count] <= least)[min(1, count - 1) :]
    choices.append(
      Choice(
        family,
        interval(N),
        interval(D),
        interval(loss),
        float(D[0] * shapes.flops_per_token(N[0])),
        float(serving.bytes(family, shapes, N[0])),
        float(serving.joules_per_token(family, shapes, N[0])),
        float(families[family].beyond(N[0], D[0])),
        float(np.mean(won)),
      )
    )
  return sorted(choices, key=lambda choice: choice.loss.estimate)


def frontier(fitted: Fitted, shapes: Shapes, flops: Array) -> Array:
  """The best N for training FLOPs (C,), of the law and each draw (1 + K, C)."""
  return np.array(
    [
      _best(law, shapes.largest, flops, None, shapes)[0]
      for law in (fitted.law, *fitted.draws)
    ]
  )


def _largest(
  family: str, budget: Budget, shapes: Shapes, serving: Serving
) -> float:
  """N that a budget allows at all."""
  limits = [shapes.largest]
  for limit, cost in (
    (budget.served_bytes, serving.bytes),
    (budget.joules_per_token, serving.joules_per_token),
  ):
    if limit is not None:
      of_size = functools.partial(cost, family, shapes)
      limits.append(float(shapes.invert(of_size, limit)))
  if min(limits) < shapes.smallest:
    asked = ' and '.join(
      f'{field}={getattr(budget, field):g}'
      for field in ('served_bytes', 'joules_per_token')
      if getattr(budget, field) is not None
    )
    raise ValueError(f'no {family} model is so small as {asked}')
  return min(limits)


def _best(
  law: Law,
  largest: float,
  flops: Numbers,
  most_tokens: float | None,
  shapes: Shapes,
) -> tuple[Array, Array, Array]:
  """N, D and the loss (C,) at the least loss for training FLOPs (C,).

  By grids of log N, each finer than the last: to 1e-6 of its range.
  """
  flops = np.reshape(flops, (-1, 1))
  low = np.full_like(flops, np.log(shapes.smallest), float)
  high = np.full_like(low, np.log(largest))
  for _ in range(5):
    N = np.exp(low + np.linspace(0, 1, 49) * (high - low))
    D = flops / shapes.flops_per_token(N)
    D = D if most_tokens is None else np.minimum(D, most_tokens)
    loss = law(N, D)
    at = np.argmin(loss, axis=1)[:, None]
    low, high = (
      np.log(np.take_along_axis(N, np.clip(at + side, 0, 48), 1))
      for side in (-1, 1)
    )
  N, D, loss = (np.take_along_axis(each, at, 1)[:, 0] for each in (N, D, loss))
  return N, D, loss
