# SPDX-License-Identifier: Apache-2.0
"""What a fit says of runs that it has not seen, and how it hangs on each."""

import dataclasses
from typing import Literal

import numpy as np
from scipy import stats

from tritera_jax.scaling import fit as fit_lib
from tritera_jax.scaling import intervals
from tritera_jax.scaling.fit import Fit
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.minimize import Array
from tritera_jax.scaling.points import Noise, Points, seed_noise


@dataclasses.dataclass(frozen=True)
class HeldOut:
  """The largest runs as the others foretell them.

  Attributes:
    fit: of the others.
    points: held out.
    foretold: nats a token of a run there; the interval has its noise too.
  """

  fit: Fit
  points: Points
  foretold: tuple[Interval, ...]

  @property
  def errors(self) -> Array:
    """Log loss less its foretold one (R,): 0.01 is 1 % above."""
    foretold_R = [each.estimate for each in self.foretold]
    return np.log(self.points.losses) - np.log(foretold_R)

  @property
  def score(self) -> float:
    """Root mean square of the errors: less is better."""
    return float(np.sqrt(np.mean(self.errors**2)))

  @property
  def inside(self) -> int:
    """Runs that lie in their intervals."""
    ends = [(each.low, each.high) for each in self.foretold]
    low_R, high_R = np.transpose(ends)
    losses_R = self.points.losses
    return int(((low_R <= losses_R) & (losses_R <= high_R)).sum())


def held_out(
  fit: Fit, by: Literal['parameters', 'tokens'], *, level: float = 0.9
) -> HeldOut:
  """Fits again without the runs of each family's largest N, or D.

  Raises:
    ValueError: what is left determines no such law.
  """
  size_R = getattr(fit.points, by)
  families = np.array(fit.points.families)
  held = np.zeros(len(size_R), bool)
  for family in fit.families:
    own = families == family
    held |= own & (size_R == size_R[own].max())
  small = fit_lib.again(fit, fit.points.take(~held))
  points = fit.points.take(held)
  laws = intervals.predictions(small, points, level=level)
  one_run = small.noise * float(stats.t.ppf((1 + level) / 2, small.degrees))
  return HeldOut(
    small, points, tuple(_wider(each, one_run) for each in laws)
  )  # fmt: skip


def _wider(interval: Interval, half: float) -> Interval:
  """By an independent part with this half width, of the log."""
  low, high = np.log([interval.low, interval.high]) - np.log(interval.estimate)
  return dataclasses.replace(
    interval,
    low=float(interval.estimate * np.exp(-np.hypot(low, half))),
    high=float(interval.estimate * np.exp(np.hypot(high, half))),
  )


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """Fits that lack one run each.

  Attributes:
    runs: left out (R).
    names: of constants (P).
    constants: without each run (R, P), in the units asked for.
    errors: log loss of each run less what the others foretell (R).
  """

  runs: tuple[str, ...]
  names: tuple[str, ...]
  constants: Array
  errors: Array


def leave_one_out(
  fit: Fit, *, parameters: float = 1.0, tokens: float = 1.0
) -> LeftOut:
  """Each run's influence on the constants, N and D in units of so many."""
  losses_R = fit.points.losses
  R = len(losses_R)
  theta = fit_lib.refit(fit, losses_R[None], 1 - np.eye(R))
  errors = np.log(losses_R) - np.diagonal(fit.form.log_loss(theta))
  form, theta = fit_lib.in_units(fit, theta, parameters, tokens)
  constants = fit_lib.natural(form, theta)
  return LeftOut(fit.points.names, form.names, constants, errors)


@dataclasses.dataclass(frozen=True)
class LackOfFit:
  """Whether residuals are larger than seeds alone make them.

  Attributes:
    ratio: variance of cells about the law over that of seeds in a cell.
    p: probability of a larger ratio were the law true.
    degrees: of freedom, of cells about the law and of seeds.
  """

  ratio: float
  p: float
  degrees: tuple[int, int]


def lack_of_fit(fit: Fit, seeds: Noise | None = None) -> LackOfFit | None:
  """F test against repeats (Draper and Smith, Applied Regression Analysis).

  It is a test of least squares, which the runs are fitted by anew for it.

  Args:
    fit: of a law.
    seeds: noise pooled over other runs too (default: over the fit's).

  Returns:
    None where no configuration was run with two seeds, or none is over.
  """
  own = seed_noise(fit.points)
  seeds = seeds or own
  repeats = own.degrees if own else 0
  if seeds is None or repeats >= fit.degrees:
    return None
  squares = fit_lib.again(fit, fit.points, fit_lib.SQUARES)
  pure = own.degrees * own.relative**2 if own else 0.0
  degrees = fit.degrees - repeats
  ratio = (np.sum(squares.residuals**2) - pure) / degrees / seeds.relative**2
  p = stats.f.sf(ratio, degrees, seeds.degrees)
  return LackOfFit(float(ratio), float(p), (degrees, seeds.degrees))
