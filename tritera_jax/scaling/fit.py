# SPDX-License-Identifier: Apache-2.0
"""Laws fitted to losses of runs.

`chinchilla` is approach 3 of Hoffmann et al. (2203.15556): Huber's loss on
differences of log losses, from a grid of starts. For each pair of exponents on
the grid E, A and B follow by linear least squares, so the starts are few and
near (variable projection, as in 2603.22339). `power_law` is Spectra's offset
power law of N. `in_bits` is one law for all families (laws.BitsLaw).
"""

from collections.abc import Collection
import dataclasses
from typing import Literal, get_args

import numpy as np

from tritera_jax.scaling import laws
from tritera_jax.scaling import minimize as minimize_lib
from tritera_jax.scaling.laws import Law
from tritera_jax.scaling.minimize import Array, Form
from tritera_jax.scaling.points import Points, refuse_what_no_law_fits

Shared = Literal['E', 'A', 'alpha', 'B', 'beta']
SQUARES = float('inf')  # delta of least squares of log losses

_EXPONENTS = np.geomspace(0.03, 3.0, 16)
_STARTS = 6


@dataclasses.dataclass(frozen=True)
class Fit:
  """A law, or one a family, and what it was fitted to.

  Attributes:
    points: the losses.
    form: its terms with N and D in units of `units`.
    theta: constants (P); those of E, A, B and gamma are logs.
    units: of N and of D: their geometric means, where constants correlate
      least.
    delta: of Huber's loss of log losses; inf is least squares.
    objective: its sum over runs.
  """

  points: Points
  form: Form
  theta: Array
  units: tuple[float, float]
  delta: float
  objective: float

  @property
  def families(self) -> list[str]:
    return list(dict.fromkeys(self.points.families))

  @property
  def laws(self) -> dict[str, Law]:
    """By family; a law in bits stands under each."""
    return {f: law_of(self, self.theta, f) for f in self.families}

  @property
  def law(self) -> Law:
    """Of the only family, or in bits.

    Raises:
      ValueError: each of several families has its own.
    """
    if len(self.families) > 1 and self.form.bits_R is None:
      raise ValueError(
        f'a fit of {", ".join(self.families)} has a law each: take .laws[...]'
      )
    return self.laws[self.families[0]]

  @property
  def residuals(self) -> Array:
    """Log loss less its law's (R,): 0.01 is 1 % above."""
    predicted = self.form.log_loss(self.theta[None])[0]
    return np.log(self.points.losses) - predicted

  @property
  def degrees(self) -> int:
    """Runs less constants."""
    return len(self.points) - len(self.theta)

  @property
  def noise(self) -> float:
    """Standard deviation of log losses that the residuals speak of."""
    return float(np.sqrt(np.sum(self.residuals**2) / self.degrees))

  def constants(
    self, parameters: float = 1.0, tokens: float = 1.0
  ) -> dict[str, float]:
    """By name, with N and D in units of so many.

    In a joint fit a name is as `alpha[ternary]`, unless it is shared.
    """
    _, theta = in_units(self, self.theta, parameters, tokens)
    values = map(float, natural(self.form, theta))
    return dict(zip(self.form.names, values, strict=True))


def chinchilla(
  points: Points, *, shared: Collection[Shared] = (), delta: float = 1e-3
) -> Fit:
  """E + A / N^alpha + B / D^beta.

  Args:
    points: of one family or of several, each with constants of its own.
    shared: constants that families have in common.
    delta: of Huber's loss, in log losses; SQUARES is the more exact where no
      run is an outlier.

  Raises:
    ValueError: the runs cannot tell the constants apart, or `shared` names
      none.
  """
  if unknown := set(shared) - set(get_args(Shared)):
    raise ValueError(
      f'shared={sorted(unknown)}: constants are {get_args(Shared)}'
    )
  return _joint(points, ('E', 'A', 'alpha', 'B', 'beta'), shared, delta)


def power_law(
  points: Points,
  *,
  shared: Collection[Literal['E', 'A', 'alpha']] = (),
  delta: float = SQUARES,
) -> Fit:
  """E + A / N^alpha, whatever the tokens; as `chinchilla`."""
  if set(shared) - {'E', 'A', 'alpha'}:
    raise ValueError(f'shared={sorted(shared)}: constants are E, A, alpha')
  return _joint(points, ('E', 'A', 'alpha'), shared, delta)


def in_bits(points: Points, *, delta: float = 1e-3) -> Fit:
  """One law of N, D and bits a weight (laws.BitsLaw), of all families.

  Raises:
    ValueError: the runs are of one family, or as in `chinchilla`.
  """
  families = dict.fromkeys(points.families)
  if len(families) < 2:
    raise ValueError(
      f'runs of {", ".join(families)} alone say nothing of bits: add runs of '
      'another family, or fit chinchilla'
    )
  refuse_what_no_law_fits(points, 6, tokens=True)
  joint = chinchilla(points, shared=('E', 'alpha', 'B', 'beta'), delta=SQUARES)
  bits_R = np.array([laws.BITS[family] for family in points.families])
  names = ('E', 'A', 'alpha', 'B', 'beta')
  plain = _form(points, names, names, joint.units)
  design = np.concatenate(
    [plain.design_RTP, np.zeros((*plain.design_RTP.shape[:2], 1))], -1
  )
  form = Form((*names, 'gamma'), design, bits_R)
  at = dict(zip(joint.form.names, joint.theta, strict=True))
  a = min(value for name, value in at.items() if name[0] == 'A')
  starts = np.array(
    [
      [at['E'], a, at['alpha'], at['B'], at['beta'], log_gamma]
      for log_gamma in np.log([0.3, 1.0, 2.0, 4.0, 8.0, 16.0])
    ]
  )
  theta, value = _minimize(form, starts[None], np.log(points.losses), delta)
  return Fit(points, form, theta[0], joint.units, delta, float(value[0]))


def refit(fit: Fit, losses_KR: Array, weights_KR: Array | None = None) -> Array:
  """Constants (K, P) of the same form for other losses of the same runs.

  Args:
    fit: where to start from.
    losses_KR: nats a token; one row stands for all.
    weights_KR: how often each run counts (default once).
  """
  K = max(len(losses_KR), 1 if weights_KR is None else len(weights_KR))
  weights = np.ones((1, len(fit.points))) if weights_KR is None else weights_KR
  return minimize_lib.minimize(
    fit.form, np.tile(fit.theta, (K, 1)), np.log(losses_KR), weights, fit.delta
  )[0]


def in_units(
  fit: Fit, theta: Array, parameters: float, tokens: float
) -> tuple[Form, Array]:
  """The form and theta (..., P) of a fit with N and D in other units."""
  theta, design = np.array(theta), fit.form.design_RTP.copy()
  names = fit.form.names
  for exponent, coefficient, unit, old in (
    ('alpha', 'A', parameters, fit.units[0]),
    ('beta', 'B', tokens, fit.units[1]),
  ):
    shift = np.log(old / unit)
    for n, name in enumerate(names):
      if name.partition('[')[0] != coefficient:
        continue
      of = _column(names, exponent, name)
      theta[..., n] += shift * theta[..., of]
      here = design[:, :, n] != 0
      design[:, :, of][here] -= shift
  return dataclasses.replace(fit.form, design_RTP=design), theta


def natural(form: Form, theta: Array) -> Array:
  """Constants (..., P) as laws have them, from theta."""
  logs = [not name.startswith(('alpha', 'beta')) for name in form.names]
  return np.where(logs, np.exp(theta), theta)


def law_of(fit: Fit, theta: Array, family: str) -> Law:
  """The law of a family whose constants are theta (P) in the fit's units."""
  form, theta = in_units(fit, theta, 1.0, 1.0)
  values = dict(zip(form.names, map(float, natural(form, theta)), strict=True))
  own = {
    name: values.get(name, values.get(f'{name}[{family}]'))
    for name in ('E', 'A', 'alpha', 'B', 'beta')
  }
  own = {name: value for name, value in own.items() if value is not None}
  counted = fit.points.counted
  if 'B' not in own:
    return laws.PowerLaw(**own, counted=counted)
  law = laws.ChinchillaLaw(**own, counted=counted)
  return laws.BitsLaw(law, values['gamma']) if 'gamma' in values else law


def _joint(
  points: Points, names: tuple[str, ...], shared: Collection[str], delta: float
) -> Fit:
  """The form of the names, each family's own but for the shared."""
  if not delta > 0:
    raise ValueError(f'delta={delta} must be > 0 (SQUARES for least squares)')
  families = tuple(dict.fromkeys(points.families))
  for family in families:
    own = [name for name in names if name not in shared]
    if 'alpha' in own or 'beta' in own:
      refuse_what_no_law_fits(
        points.of_families({family}), len(own), tokens='beta' in own
      )
  y_R = np.log(points.losses)
  centre = [float(np.exp(np.mean(np.log(points.parameters)))), 1.0]
  if 'B' in names:
    centre[1] = float(np.exp(np.mean(np.log(points.tokens))))
  units = (centre[0], centre[1])
  form = _form(points, names, shared, units)
  refuse_what_no_law_fits(points, len(form.names), tokens='B' in names)
  theta_SP = np.zeros((1, _STARTS, len(form.names)))
  count = np.zeros(len(form.names))
  for family in families:
    mask = np.array([each == family for each in points.families])
    own = _starts(points.take(mask), 'B' in names, units, y_R[None, mask])
    for n, name in enumerate(names):
      column = _column(form.names, name, f'[{family}]')
      theta_SP[:, :, column] += own[:, :, n]
      count[column] += 1
  theta, value = _minimize(form, theta_SP / count, y_R, delta)
  return Fit(points, form, theta[0], units, delta, float(value[0]))


def _column(names: tuple[str, ...], name: str, like: str) -> int:
  """Where a constant is: shared, or of the family that `like` ends with."""
  return names.index(name if name in names else name + like[like.find('[') :])


def _form(
  points: Points,
  names: tuple[str, ...],
  shared: Collection[str],
  units: tuple[float, float],
) -> Form:
  families = tuple(dict.fromkeys(points.families))
  every = [
    name if name in shared or len(families) == 1 else f'{name}[{family}]'
    for name in names
    for family in families
  ]
  every = tuple(dict.fromkeys(every))
  design = np.zeros((len(points), 3 if 'B' in names else 2, len(every)))
  slope = {
    'E': (0, np.ones(len(points))),
    'A': (1, np.ones(len(points))),
    'alpha': (1, -np.log(points.parameters / units[0])),
    'B': (2, np.ones(len(points))),
    'beta': (2, -np.log(points.tokens / units[1])),
  }
  for name in names:
    term, value = slope[name]
    for family in families:
      mask = np.array([each == family for each in points.families])
      column = _column(every, name, f'[{family}]')
      design[mask, term, column] = value[mask]
  return Form(every, design)


def _starts(
  points: Points, tokens: bool, units: tuple[float, float], y_KR: Array
) -> Array:
  """The best of a grid of exponents (K, S, P), for one family.

  Differences of losses over the loss are those of logs to first order, and
  linear in E, A and B.
  """
  x_R = np.log(points.parameters / units[0])
  alpha, beta = (
    each.ravel()
    for each in np.meshgrid(
      _EXPONENTS, _EXPONENTS if tokens else [0.0], indexing='ij'
    )
  )
  columns = [np.ones((len(alpha), len(x_R))), np.exp(-alpha[:, None] * x_R)]
  if tokens:
    columns.append(np.exp(-beta[:, None] * np.log(points.tokens / units[1])))
  basis = np.stack(columns, -1)  # (grid, R, terms)
  loss_KR = np.exp(y_KR)
  inverse = np.linalg.pinv(basis / loss_KR.mean(0)[:, None])
  found = np.einsum('gtr,kr->kgt', inverse, loss_KR / loss_KR.mean(0))
  # A term cannot be negative; where the best is, let it be small.
  found = np.maximum(found, 1e-3 * loss_KR.mean())
  residual = np.log(np.einsum('grt,kgt->kgr', basis, found)) - y_KR[:, None]
  best = np.argsort((residual**2).sum(-1))[:, :_STARTS]
  log = np.log(np.take_along_axis(found, best[..., None], 1))
  theta = [log[..., 0], log[..., 1], alpha[best]]
  if tokens:
    theta += [log[..., 2], beta[best]]
  return np.stack(theta, -1)


def _minimize(
  form: Form, starts_KSP: Array, y_KR: Array, delta: float
) -> tuple[Array, Array]:
  """The best minimum (K, P) from S starts for each of K problems.

  Least squares go first: Huber's loss with a delta below the noise has kinks
  all over.
  """
  K, S, P = starts_KSP.shape
  y_KR = np.repeat(np.broadcast_to(y_KR, (K, len(form.design_RTP))), S, axis=0)
  ones = np.ones((1, y_KR.shape[1]))
  theta, value = minimize_lib.minimize(
    form, starts_KSP.reshape(-1, P), y_KR, ones, SQUARES
  )
  if delta < SQUARES:
    theta, value = minimize_lib.minimize(form, theta, y_KR, ones, delta)
  best = value.reshape(K, S).argmin(-1)
  pick = np.arange(K) * S + best
  return theta[pick], value[pick]
