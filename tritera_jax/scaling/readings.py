# SPDX-License-Identifier: Apache-2.0
"""What a fitted law says of data and parameters."""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

from tritera_jax.scaling import plan
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.laws import ChinchillaLaw


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

  ratio: Interval
  parameters_exponent: Interval
  tokens_exponent: Interval
  parameters: float
  tokens: float
  gain_of_parameters: Interval
  gain_of_tokens: Interval
  double_parameters: Interval
  double_tokens: Interval
  share_for_parameters: float


def readings(
  law: ChinchillaLaw,
  draws: Sequence[ChinchillaLaw],
  parameters: float,
  tokens: float,
) -> Readings:
  """Both readings of a law, the second at a point."""

  def estimate(f: Callable[[ChinchillaLaw], float]) -> Interval:
    return plan.interval([f(each) for each in (law, *draws)])

  def gains(law: ChinchillaLaw) -> tuple[float, float]:
    sizes, data = law.terms(parameters, tokens)
    return float(law.alpha * sizes), float(law.beta * data)

  def doubling(law: ChinchillaLaw, n: int, d: int) -> float:
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
