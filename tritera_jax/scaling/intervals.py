# SPDX-License-Identifier: Apache-2.0
"""How far to trust a fit.

`profile` is the default: a constant's interval is where the objective,
minimised over all other constants, has risen by no more than

  F(level; 1, R - P) / 2 * E[psi^2] / E[psi']

with psi the slope of Huber's loss and expectations over normal noise as large
as the residuals say (R runs, P constants). For least squares the last factor
is the noise's variance and the region that of Bates and Watts (Nonlinear
Regression Analysis, 1988, chapter 6); for Huber's loss it is the test of
M-estimators by their objective (Hampel et al., Robust Statistics, 1986,
chapter 7). A constant that the runs do not bound has an end at 0 or inf.

experiments/recovery.py counts how often each kind of interval here covers.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tritera_jax.scaling import fit as fit_lib
from tritera_jax.scaling.fit import Fit
from tritera_jax.scaling.minimize import (
  Array,
  Form,
  derivatives,
  minimize,
  objective,
)
from tritera_jax.scaling.points import Points

Walks = NDArray[np.intp]

_FURTHEST = 40.0  # from an estimate: e^-40 is nothing, an exponent of 40 too
_NEAR = 1e-3  # of the square root of the allowed rise
_HEAVY = 1e3  # times all runs: the weight of a run whose loss is held


@dataclasses.dataclass(frozen=True)
class Interval:
  """A number, and between which it lies at a level of confidence.

  Attributes:
    estimate: of the fit.
    low: end; where it is not bounded 0, or -inf for an exponent.
    high: end; inf where it is not bounded.
    level: 0.9 misses one in ten.
  """

  estimate: float
  low: float
  high: float
  level: float


def profile(
  fit: Fit, *, level: float = 0.9, parameters: float = 1.0, tokens: float = 1.0
) -> dict[str, Interval]:
  """Profile-likelihood intervals of the constants, by name.

  Args:
    fit: of a law or of several.
    level: of confidence, between 0 and 1.
    parameters: N is in units of so many.
    tokens: D is in units of so many.
  """
  low_KP, high_KP = profiles(
    fit, fit.theta[None], fit.points.losses[None], level=level,
    parameters=parameters, tokens=tokens,
  )  # fmt: skip
  return {
    name: Interval(value, float(low), float(high), level)
    for (name, value), low, high in zip(
      fit.constants(parameters, tokens).items(), low_KP[0], high_KP[0],
      strict=True,
    )
  }  # fmt: skip


def profiles(
  fit: Fit,
  theta_KP: Array,
  losses_KR: Array,
  *,
  level: float,
  parameters: float = 1.0,
  tokens: float = 1.0,
) -> tuple[Array, Array]:
  """Ends (K, P) of profile intervals for K refits of a fit's runs.

  Args:
    fit: whose form, units and delta are used.
    theta_KP: of `fit.refit(fit, losses_KR)`.
    losses_KR: nats a token.
    level: of confidence.
    parameters: N is in units of so many.
    tokens: D is in units of so many.
  """
  form, theta_KP = fit_lib.in_units(fit, theta_KP, parameters, tokens)
  y_KR = np.log(losses_KR)
  ones, delta = np.ones((1, y_KR.shape[1])), fit.delta
  K, P = theta_KP.shape
  least_K = objective(form, theta_KP, y_KR, ones, delta)
  allowed_K = _allowed(form.log_loss(theta_KP) - y_KR, P, delta, level)
  covariance_KPP = _inverse(form, theta_KP, y_KR, delta)
  variance_KP = np.diagonal(covariance_KPP, axis1=1, axis2=2)
  # One walk for each constant and side.
  k, p, side = (each.ravel() for each in np.indices((K, P, 2)))

  def risen(which, values, near):
    at, free = near.copy(), np.ones(near.shape, bool)
    rows = np.arange(len(which))
    at[rows, p[which]], free[rows, p[which]] = values, False
    at, value = minimize(form, at, y_KR[k[which]], ones, delta, free)
    rise = np.maximum(value - least_K[k[which]], 0)
    return np.sqrt(rise / allowed_K[k[which]]), at

  ends = _walk(
    theta_KP[k, p],
    np.where(side, 1.0, -1.0),
    np.sqrt(2 * allowed_K[k] * variance_KP[k, p]),
    theta_KP[k],
    risen,
  ).reshape(K, P, 2)
  return (
    fit_lib.natural(form, ends[..., 0]), fit_lib.natural(form, ends[..., 1])
  )  # fmt: skip


def predictions(
  fit: Fit, points: Points, *, level: float = 0.9
) -> list[Interval]:
  """Profile-likelihood intervals of the law itself at other points.

  Their losses are not looked at. A run there varies about the law by
  `fit.noise` more.

  Raises:
    ValueError: a point is of a family that the fit does not know.
  """
  form, R = fit_lib.form_at(fit, points), len(fit.points)
  rows = [[*range(R), R + n] for n in range(len(points))]
  held = [
    dataclasses.replace(
      form,
      design_RTP=form.design_RTP[row],
      bits_R=None if form.bits_R is None else form.bits_R[row],
    )
    for row in rows
  ]
  return [_prediction(fit, one, level) for one in held]


def _prediction(fit: Fit, form: Form, level: float) -> Interval:
  """Of the last run of a form, whose other runs are the fit's.

  A heavy run whose loss is the value asked for holds the law there.
  """
  R = len(fit.points)
  y_R, ones = np.log(fit.points.losses), np.ones((1, R))
  weights = np.append(ones, [[_HEAVY * R]], axis=1)
  delta_R = np.append(np.full(R, fit.delta), np.inf)
  theta = fit.theta[None]
  allowed = _allowed(fit.residuals[None], len(fit.theta), fit.delta, level)[0]
  estimate = form.log_loss(theta)[0, -1]
  log_KRT, slope = form.terms(theta)
  gradient_P = np.exp(log_KRT[0, -1] - estimate) @ slope[0, -1]
  covariance_PP = _inverse(fit.form, theta, y_R[None], fit.delta)[0]
  step = np.sqrt(2 * allowed * (gradient_P @ covariance_PP @ gradient_P))

  def risen(which, values, near):
    y_KR = np.column_stack([np.tile(y_R, (len(which), 1)), values])
    at, _ = minimize(form, near, y_KR, weights, delta_R)
    value = objective(fit.form, at, y_R[None], ones, fit.delta)
    return np.sqrt(np.maximum(value - fit.objective, 0) / allowed), at

  low, high = _walk(
    np.full(2, estimate),
    np.array([-1.0, 1.0]),
    np.full(2, step),
    np.tile(fit.theta, (2, 1)),
    risen,
  )
  estimate, low, high = (float(np.exp(x)) for x in (estimate, low, high))
  return Interval(estimate, low, high, level)


def bootstrap(
  fit: Fit,
  *,
  draws: int,
  seed: int | Sequence[int],
  resample: Literal['runs', 'residuals'] = 'runs',
) -> Array:
  """Constants (draws, P), in the fit's units, of refits to resampled runs.

  A sample of laws, for what has no profile: `fit.law_of` makes each a law.

  Args:
    fit: of a law or of several.
    draws: resamples.
    seed: of the resamples.
    resample: 'runs' draws runs of each family with replacement, again where
      they cannot determine the law. 'residuals' draws residuals onto the
      fitted law, sqrt(R / (R - P)) larger than they are because the law has
      bent to them; it takes every run to be as noisy as another.

  Raises:
    ValueError: few resamples of the runs determine the law.
  """
  rng = np.random.default_rng(seed)
  R = len(fit.points)
  losses = fit.points.losses
  if resample == 'residuals':
    residual_R = fit.residuals - fit.residuals.mean()
    residual_R *= np.sqrt(R / fit.degrees)
    fitted_R = np.log(losses) - fit.residuals
    noise_KR = rng.choice(residual_R, (draws, R))
    return fit_lib.refit(fit, np.exp(fitted_R + noise_KR))
  weights_KR = np.empty((0, R))
  for _ in range(10):
    drawn = _resampled_runs(fit, rng, draws)
    weights_KR = np.concatenate([weights_KR, drawn])[:draws]
    if len(weights_KR) == draws:
      return fit_lib.refit(fit, losses[None], weights_KR)
  raise ValueError(
    f"few resamples of {R} runs determine the law: use resample='residuals', "
    'or profile'
  )


def percentiles(
  fit: Fit,
  theta_KP: Array,
  *,
  level: float = 0.9,
  parameters: float = 1.0,
  tokens: float = 1.0,
) -> dict[str, Interval]:
  """Central intervals of the constants of a bootstrap, by name."""
  form, theta_KP = fit_lib.in_units(fit, theta_KP, parameters, tokens)
  ends = np.quantile(theta_KP, [(1 - level) / 2, (1 + level) / 2], axis=0)
  low_P, high_P = fit_lib.natural(form, ends)
  return {
    name: Interval(value, float(low), float(high), level)
    for (name, value), low, high in zip(
      fit.constants(parameters, tokens).items(), low_P, high_P, strict=True
    )
  }


def _resampled_runs(fit: Fit, rng: np.random.Generator, draws: int) -> Array:
  """How often each run was drawn, of those draws that determine the law."""
  families = np.array(fit.points.families)
  weights_KR = np.zeros((draws, len(families)))
  for family in fit.families:
    own = np.flatnonzero(families == family)
    weights_KR[:, own] = rng.multinomial(
      len(own), np.full(len(own), 1 / len(own)), size=draws
    )
  enough_K = (weights_KR > 0).sum(-1) > len(fit.theta)
  axes = [fit.points.parameters, fit.points.tokens]
  for axis_R in axes[: 1 if fit.kind == 'power' else 2]:
    cells = [weights_KR[:, axis_R == v].any(-1) for v in np.unique(axis_R)]
    enough_K &= np.sum(cells, axis=0) >= 3
  return weights_KR[enough_K]


def _allowed(residual_KR: Array, P: int, delta: float, level: float) -> Array:
  """The rise of the objective that an interval may have (K,)."""
  if not 0 < level < 1:
    raise ValueError(f'level={level} must be between 0 and 1 (0.9)')
  degrees = residual_KR.shape[1] - P
  variance_K = (residual_KR**2).sum(-1) / degrees
  variance_K = np.maximum(variance_K, 1e-24)  # of losses without noise
  quantile = stats.f.ppf(level, 1, degrees) / 2
  if np.isinf(delta):
    return quantile * variance_K
  z_K = delta / np.sqrt(variance_K)
  inside_K = 2 * stats.norm.cdf(z_K) - 1
  squared_K = inside_K - 2 * z_K * stats.norm.pdf(z_K)  # E[r^2; inside]
  squared_K = variance_K * squared_K + delta**2 * (1 - inside_K)
  return quantile * squared_K / inside_K


def _inverse(form: Form, theta_KP: Array, y_KR: Array, delta: float) -> Array:
  """Of the objective's Hessian (K, P, P): how far constants may go."""
  ones = np.ones((1, y_KR.shape[1]))
  _, hess, scale = derivatives(form, theta_KP, y_KR, ones, delta)
  unit = np.sqrt(scale + 1e-12 * scale.max(-1, keepdims=True))
  unit = unit[:, :, None] * unit[:, None, :]
  level, axes = np.linalg.eigh(hess / unit)
  return (
    (axes / np.maximum(np.abs(level), 1e-9)[:, None])
    @ axes.swapaxes(1, 2)
    / unit
  )


def _walk(
  start_M: Array,
  sign_M: Array,
  step_M: Array,
  theta_MP: Array,
  risen: Callable[[Walks, Array, Array], tuple[Array, Array]],
) -> Array:
  """Values (M,) beside estimates where `risen` reaches 1, or -inf or inf.

  Args:
    start_M: estimates.
    sign_M: which way.
    step_M: how far the end should be.
    theta_MP: constants at the estimates.
    risen: of the numbers of walks, their values and constants near to them:
      the square root of the objective's rise over the allowed, which is
      nearly linear, and the constants there.
  """
  M = len(start_M)
  inner, outer = np.zeros(M), np.clip(step_M, 1e-12, 2.0)
  inner_rise, outer_rise = np.zeros(M), np.zeros(M)
  inner_at, outer_at = theta_MP.copy(), theta_MP.copy()
  going = np.arange(M)
  while len(going):
    values = start_M[going] + sign_M[going] * outer[going]
    outer_rise[going], outer_at[going] = risen(going, values, inner_at[going])
    going = going[(outer_rise[going] < 1) & (outer[going] < _FURTHEST)]
    inner[going], inner_rise[going] = outer[going], outer_rise[going]
    inner_at[going] = outer_at[going]
    outer[going] *= np.clip(1.2 / np.maximum(outer_rise[going], 0.1), 1.3, 4)
  end = np.where(outer_rise < 1, np.inf, outer)
  going = np.flatnonzero(outer_rise >= 1)
  for turn in range(40):
    if not len(going):
      break
    # Linear between the two, and every third time half way.
    span = outer_rise[going] - inner_rise[going]
    share = np.clip((1 - inner_rise[going]) / span, 0.02, 0.98)
    share = share if turn % 3 < 2 else np.full(len(going), 0.5)
    middle = inner[going] + share * (outer[going] - inner[going])
    near = np.where(share[:, None] < 0.5, inner_at[going], outer_at[going])
    rise, at = risen(going, start_M[going] + sign_M[going] * middle, near)
    end[going] = middle
    for below, (edge, edge_rise, edge_at) in (
      (True, (inner, inner_rise, inner_at)),
      (False, (outer, outer_rise, outer_at)),
    ):
      here = (rise < 1) == below
      edge[going[here]] = middle[here]
      edge_rise[going[here]] = rise[here]
      edge_at[going[here]] = at[here]
    going = going[np.abs(rise - 1) > _NEAR]
  return start_M + sign_M * end
