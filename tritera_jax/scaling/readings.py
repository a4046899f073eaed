# SPDX-License-Identifier: Apache-2.0
"""What fitted laws say of data, parameters and families."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import numpy as np

from tritera_jax.scaling.laws import ChinchillaLaw
from tritera_jax.scaling.plan import Array, Estimate


@dataclasses.dataclass(frozen=True)
class Readings:
  """Two readings of a law's exponents, which can disagree.

  The first compares exponents: beta / alpha > 1 is read as "data helps more"
  (2506.23025). The second asks what a law says: the larger an exponent, the
  sooner its term is used up, so at C = 6 N D the best N grows as
  C^(beta / (alpha + beta)), and which of N and D helps more depends on where
  one is.

  Attributes:
    ratio: beta / alpha.
    parameters_exponent: p of N ~ C^p, beta / (alpha + beta).
    tokens_exponent: of D ~ C^p, alpha / (alpha + beta).
    parameters: N of the point that the gains are at.
    tokens: D of it.
    gain_of_parameters: -dL/dlogN there, nats a token.
    gain_of_tokens: -dL/dlogD there.
    double_parameters: nats a token that twice the parameters gain.
    double_tokens: nats a token that twice the tokens gain.
    share_for_parameters: of draws in which more parameters gain more.
  """

  ratio: Estimate
  parameters_exponent: Estimate
  tokens_exponent: Estimate
  parameters: float
  tokens: float
  gain_of_parameters: Estimate
  gain_of_tokens: Estimate
  double_parameters: Estimate
  double_tokens: Estimate
  share_for_parameters: float


def readings(
  law: ChinchillaLaw,
  draws: Sequence[ChinchillaLaw],
  parameters: float,
  tokens: float,
) -> Readings:
  """Both readings of a law, the second at a point."""

  def estimate(f: Callable[[ChinchillaLaw], float]) -> Estimate:
    return Estimate.of([f(each) for each in (law, *draws)])

  def gains(law: ChinchillaLaw) -> tuple[float, float]:
    sizes, data = law.terms(parameters, tokens)
    return float(law.alpha * sizes), float(law.beta * data)

  def doubling(law: ChinchillaLaw, n: float, d: float) -> float:
    return float(law(parameters, tokens) - law(n * parameters, d * tokens))

  pairs = np.array([gains(each) for each in (draws or [law])])
  return Readings(
    estimate(lambda law: law.beta / law.alpha),
    estimate(lambda law: law.beta / (law.alpha + law.beta)),
    estimate(lambda law: law.alpha / (law.alpha + law.beta)),
    parameters,
    tokens,
    estimate(lambda law: gains(law)[0]),
    estimate(lambda law: gains(law)[1]),
    estimate(lambda law: doubling(law, 2, 1)),
    estimate(lambda law: doubling(law, 1, 2)),
    float(np.mean(pairs[:, 0] > pairs[:, 1])),
  )


@dataclasses.dataclass(frozen=True)
class Crossing:
  """Where two families have one loss, as something grows.

  Attributes:
    at: what grows there, its last crossing; None where they do not cross.
    loss: nats a token there.
    before: the family with the lower loss before it, or all along.
    after: the one after it.
    share: of draws that cross at all; that of `at`'s interval.
  """

  at: Estimate | None
  loss: float | None
  before: str
  after: str
  share: float


def crossing(grows: Array, losses: Mapping[str, Array]) -> Crossing:
  """The last place in a table where the losses of two families cross.

  Args:
    grows: parameters or bytes (X,), rising: dense enough to interpolate its
      logarithm linearly.
    losses: of the two families (1 + K, X), as `Fitted.table` gives them.
  """
  one, other = losses
  apart = losses[one] - losses[other]
  x = np.log(grows)
  roots = [_last_root(x, row) for row in apart]
  at, *found = roots
  found = [root for root in found if root is not None]
  names = {True: one, False: other}
  if at is None:
    lower = names[bool(apart[0, -1] < 0)]
    return Crossing(None, None, lower, lower, _share(found, roots))
  after = names[bool(apart[0, x > at][0] < 0)]
  return Crossing(
    Estimate.of(np.exp([at, *found])),
    float(np.interp(at, x, losses[one][0])),
    other if after == one else one,
    after,
    _share(found, roots),
  )


def _share(found: list, roots: list) -> float:
  return len(found) / max(len(roots) - 1, 1)


def _last_root(x: Array, y: Array) -> float | None:
  changes = np.flatnonzero(np.signbit(y[1:]) != np.signbit(y[:-1]))
  if not len(changes):
    return None
  k = changes[-1]
  return float(x[k] - y[k] * (x[k + 1] - x[k]) / (y[k + 1] - y[k]))
