# SPDX-License-Identifier: Apache-2.0
"""Loss deceleration (arXiv 2506.05447).

The loss L of step t is a power law with one break and no floor, whose
logarithm is

  log b - c0 log t - c1 f1 log(1 + exp((log t - log d1) / f1)).

Its lines before and after the break meet at step t_d = d1, at loss
L_d = b d1^-c0; the second falls with the exponent r_d = c0 + c1.
"""

import dataclasses
import math
import warnings

import numpy as np
from scipy import optimize

_PARAMETERS = 'b', 'c0', 'c1', 'log_d1', 'f1'


@dataclasses.dataclass(frozen=True)
class Curve:
  """How a loss curve is smoothed, thinned and fitted.

  The defaults are the paper's, for 262,144 steps.

  Attributes:
    ratio: the loss of step t is its mean over steps t / ratio to t.
    spacing: most steps between those kept: 10 to 100 by one, to 1,000 by
      ten, to 10,000 by a hundred and so on.
    after: steps up to this one are dropped.
    guess: step where the break is looked for first.
  """

  ratio: float = 1.2
  spacing: int = 1000
  after: int = 100
  guess: int = 6000

  def __post_init__(self):
    if not 1 < self.ratio < math.inf:
      raise ValueError(f'curve.ratio={self.ratio} must be > 1')
    for field in ('spacing', 'guess'):
      if getattr(self, field) < 1:
        raise ValueError(f'curve.{field}={getattr(self, field)} must be >= 1')
    if self.after < 0:
      raise ValueError(f'curve.after={self.after} must be >= 0')


class NoBreakError(ValueError):
  """A loss curve shows no deceleration; its message says why."""


@dataclasses.dataclass(frozen=True)
class Deceleration:
  """A one-break law and how well it is known.

  Attributes:
    b: loss of step 1 on the line before the break.
    c0: exponent before the break.
    c1: what the break adds to it; negative.
    log_d1: natural logarithm of the step of the break.
    f1: width of the break, in natural logarithms of steps.
    covariance: of these five, in this order.
    rsle: root mean square of the residuals of log L.
    rsle_line: the same of the best power law without a break.
    steps: T, the last.
    final_loss: L_T, the smoothed loss of step T.
  """

  b: float
  c0: float
  c1: float
  log_d1: float
  f1: float
  covariance: tuple[tuple[float, ...], ...] = ((0.0,) * 5,) * 5
  rsle: float = 0.0
  rsle_line: float = 0.0
  steps: int = 0
  final_loss: float = 0.0

  @property
  def t_d(self) -> float:
    return math.exp(self.log_d1)

  @property
  def L_d(self) -> float:
    return self.b * math.exp(-self.c0 * self.log_d1)

  @property
  def r_d(self) -> float:
    return self.c0 + self.c1

  def loss(self, steps):
    """L of steps, scalar or array."""
    return np.exp(_log_loss(np.log(steps), math.log(self.b), *self._rest))

  def extrapolated(self, steps: int | float) -> float:
    """L_d (t_d / T)^r_d: where the line after the break is at step T."""
    return self.L_d * (self.t_d / steps) ** self.r_d

  @property
  def errors(self) -> dict[str, float]:
    """One standard deviation of each parameter, and of t_d, L_d and r_d.

    The parameters' are the roots of the covariance's diagonal, as in the
    paper; the others' follow to first order. They take residuals for
    independent. Those of a smoothed curve are not: the errors are too small.
    """
    slopes: dict[str, np.ndarray] = {}
    slopes.update(zip(_PARAMETERS, np.eye(5), strict=True))
    t_d, L_d = self.t_d, self.L_d
    slopes['t_d'] = np.array([0, 0, 0, t_d, 0])
    slopes['L_d'] = L_d * np.array([1 / self.b, -self.log_d1, 0, -self.c0, 0])
    slopes['r_d'] = np.array([0, 1, 1, 0, 0])
    covariance = np.array(self.covariance)
    return {
      name: math.sqrt(max(0.0, slope @ covariance @ slope))
      for name, slope in slopes.items()
    }

  @property
  def _rest(self) -> tuple[float, ...]:
    return self.c0, self.c1, self.log_d1, self.f1

  def __str__(self) -> str:
    e = self.errors
    return (
      f't_d {self.t_d:,.0f} +- {e["t_d"]:,.0f} steps, '
      f'L_d {self.L_d:.3f} +- {e["L_d"]:.3f} nats, '
      f'r_d {self.r_d:.4f} +- {e["r_d"]:.4f} (before it {self.c0:.4f} +- '
      f'{e["c0"]:.4f}); RSLE {self.rsle:.4f}, without a break '
      f'{self.rsle_line:.4f}'
    )


def _log_loss(log_t, log_b, c0, c1, log_d1, f1):
  bend = np.logaddexp(0.0, (log_t - log_d1) / f1)
  return log_b - c0 * log_t - c1 * f1 * bend


def smoothed(steps, losses, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
  """The steps that are kept of a run, and their smoothed losses.

  Args:
    steps: integers [N], growing, from 0 or 1 on; some may be missing.
    losses: nats a token [N], of the batches of these steps.
    curve: see `Curve`.

  Raises:
    ValueError: steps do not grow, or a loss is not finite and positive.
  """
  steps = np.asarray(steps, np.int64)
  losses = np.asarray(losses, np.float64)
  if steps.ndim != 1 or steps.shape != losses.shape:
    raise ValueError(
      f'steps of shape {steps.shape} and losses of {losses.shape}; give one '
      'loss for each step'
    )
  if len(steps) and not (steps[0] >= 0 and (np.diff(steps) > 0).all()):
    raise ValueError('steps must grow, from 0 or later on')
  if not (np.isfinite(losses) & (losses > 0)).all():
    raise ValueError('a loss is not finite or not > 0, and has no logarithm')
  total = np.concatenate([[0.0], np.cumsum(losses)])
  first = np.searchsorted(steps, np.floor(steps / curve.ratio))
  last = np.arange(1, len(steps) + 1)
  means = (total[last] - total[first]) / (last - first)
  # Only the first two digits are other than 0.
  digits = 1 + np.searchsorted(10 ** np.arange(1, 19), steps, side='right')
  apart = np.minimum(10 ** np.maximum(digits - 2, 0), curve.spacing)
  kept = steps % apart == 0
  kept[-1:] = True
  kept &= steps > curve.after
  return steps[kept], means[kept]


def fit(steps, losses, curve: Curve = Curve()) -> Deceleration:
  """The one-break law of a run's losses, by least squares of log L.

  Args:
    steps: as of `smoothed`, which is applied first.
    losses: as of `smoothed`.
    curve: as of `smoothed`.

  Raises:
    NoBreakError: the run is too short to show a break at curve.guess, or the
      best law has none within the steps that were kept, or may have none.
    ValueError: as of `smoothed`.
  """
  return fit_smoothed(*smoothed(steps, losses, curve), curve)


def fit_smoothed(steps, losses, curve: Curve = Curve()) -> Deceleration:
  """`fit` of what is smoothed and thinned already."""
  if not len(steps):
    raise NoBreakError(
      f'no steps kept after curve.after={curve.after}: train longer, or give a '
      'smaller one'
    )
  x, y = np.log(steps), np.log(losses)
  after = int(np.count_nonzero(np.asarray(steps) > curve.guess))
  before = len(x) - after
  if min(before, after) < 5:
    raise NoBreakError(
      f'{before} of the steps kept come before curve.guess={curve.guess} and '
      f'{after} after it, from {min(steps)} to '
      f'{max(steps)}: too few to show a break there; train longer, '
      'log every step, or give another guess'
    )
  at = int(np.argmin(np.abs(x - math.log(curve.guess))))
  slopes = np.diff(y) / np.diff(x)
  c0 = -slopes[:at].mean()
  # That the last slope is left out is the authors' code.
  c1 = -slopes[at:-1].mean() - c0
  # They start b at this logarithm; to fit log b is the same and begins nearer.
  start = [y[0] + c0 * x[0], c0, c1, math.log(curve.guess)]
  # The paper's f1 is 0.3. A step too long ends at a break without width, which
  # has no way back: now and then, in noise, another start is needed.
  fits = [_least_squares(x, y, [*start, f1]) for f1 in (0.3, 0.1, 1.0)]
  fits = [one for one in fits if one is not None]
  if not fits:
    raise NoBreakError('no one-break law fits the losses')
  residual, found, covariance = min(fits, key=lambda one: one[0])
  log_b, c0, c1, log_d1, f1 = map(float, found)
  if not x[0] < log_d1 < x[-1]:
    raise NoBreakError(
      f'the best law breaks outside the steps kept, {steps[0]:,} to '
      f'{steps[-1]:,}: the run shows no break'
    )
  to_b = np.array([math.exp(log_b), 1, 1, 1, 1])
  line = np.polyval(np.polyfit(x, y, 1), x)
  law = Deceleration(
    math.exp(log_b),
    c0,
    c1,
    log_d1,
    f1,
    tuple(map(tuple, (covariance * np.outer(to_b, to_b)).tolist())),
    residual,
    _rms(line - y),
    int(steps[-1]),
    float(losses[-1]),
  )
  if c1 >= 0:
    raise NoBreakError(
      f'the best law falls faster after step {law.t_d:,.0f}, by the exponent '
      f'{law.r_d:.4f} after {c0:.4f}: the run does not decelerate'
    )
  if -c1 < 2 * law.errors['c1']:
    raise NoBreakError(
      f'at step {law.t_d:,.0f} the exponent {c0:.4f} changes by {c1:.4f} +- '
      f'{law.errors["c1"]:.4f}, which may be nothing; train longer'
    )
  return law


def _least_squares(x, y, start):
  """RSLE, log b and the rest, and their covariance; None: no such law."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error', optimize.OptimizeWarning)
      found, covariance = optimize.curve_fit(
        _log_loss,
        x,
        y,
        start,
        bounds=([-np.inf] * 4 + [1e-6], np.inf),
        method='dogbox',
      )
  except (RuntimeError, optimize.OptimizeWarning):
    return None
  return _rms(_log_loss(x, *found) - y), found, covariance


def _rms(values: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(values))))
