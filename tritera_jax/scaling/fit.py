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
from typing import Literal

import numpy as np

from tritera_jax.scaling import laws
from tritera_jax.scaling.laws import Law
from tritera_jax.scaling.minimize import Array, Form, minimize
from tritera_jax.scaling.points import Points, refuse_what_no_law_fits

Kind = Literal['power', 'chinchilla', 'bits']
SQUARES = float('inf')  # delta of least squares of log losses

_CONSTANTS: dict[Kind, tuple[str, ...]] = {
  'power': ('E', 'A', 'alpha'),
  'chinchilla': ('E', 'A', 'alpha', 'B', 'beta'),
  'bits': ('E', 'A', 'alpha', 'B', 'beta', 'gamma'),
}
_EXPONENTS = np.geomspace(0.03, 3.0, 16)
_GAMMAS = np.geomspace(0.3, 16.0, 6)  # bits
_STARTS = 6


@dataclasses.dataclass(frozen=True)
class Fit:
  """A law, or one a family, and what it was fitted to.

  Attributes:
    kind: of law.
    shared: constants that families have in common.
    points: the losses.
    form: the law's terms with N and D in `units`.
    theta: constants (P); those of E, A, B and gamma are logs.
    units: of N and of D: their geometric means, where constants correlate
      least.
    delta: of Huber's loss of log losses; inf is least squares.
    objective: its sum over runs.
  """

  kind: Kind
  shared: tuple[str, ...]
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
    if len(self.families) > 1 and self.kind != 'bits':
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
    form, theta = in_units(self, self.theta, parameters, tokens)
    values = map(float, natural(form, theta))
    return dict(zip(form.names, values, strict=True))


def chinchilla(
  points: Points, *, shared: Collection[str] = (), delta: float = 1e-3
) -> Fit:
  """E + A / N^alpha + B / D^beta.

  Args:
    points: of one family or of several, each with constants of its own.
    shared: constants that families have in common: E, A, alpha, B, beta.
    delta: of Huber's loss, in log losses. With Chinchilla's 1e-3, below the
      noise of most runs, one odd run moves little; SQUARES has intervals
      some 15 % narrower where none is odd.

  Raises:
    ValueError: the runs cannot tell the constants apart, or `shared` names
      none.
  """
  return _fit('chinchilla', points, shared, delta)


def power_law(
  points: Points, *, shared: Collection[str] = (), delta: float = SQUARES
) -> Fit:
  """E + A / N^alpha, whatever the tokens; as `chinchilla`."""
  return _fit('power', points, shared, delta)


def in_bits(points: Points, *, delta: float = 1e-3) -> Fit:
  """One law of N, D and bits a weight (laws.BitsLaw), of all families.

  Raises:
    ValueError: the runs are of one family, or as in `chinchilla`.
  """
  if len(set(points.families)) < 2:
    raise ValueError(
      f'runs of {", ".join(sorted(set(points.families)))} alone say nothing '
      'of bits: add runs of another family, or fit chinchilla'
    )
  return _fit('bits', points, _CONSTANTS['bits'], delta)


def again(fit: Fit, points: Points, delta: float | None = None) -> Fit:
  """The same kind of fit to other points, or by another loss; raises alike."""
  return _fit(
    fit.kind, points, fit.shared, fit.delta if delta is None else delta
  )


def refit(fit: Fit, losses_KR: Array, weights_KR: Array | None = None) -> Array:
  """Constants (K, P), in the fit's units, for other losses of its runs.

  Args:
    fit: where to start from.
    losses_KR: nats a token; one row stands for all.
    weights_KR: how often each run counts (default once).
  """
  weights = np.ones((1, len(fit.points))) if weights_KR is None else weights_KR
  start = np.tile(fit.theta, (max(len(losses_KR), len(weights)), 1))
  return minimize(fit.form, start, np.log(losses_KR), weights, fit.delta)[0]


def form_at(fit: Fit, points: Points) -> Form:
  """The fit's form at its own runs and then at other points.

  Raises:
    ValueError: a point is of a family that the fit does not know.
  """
  known = set(laws.BITS) if fit.kind == 'bits' else set(fit.families)
  if unknown := set(points.families) - known:
    raise ValueError(
      f'family {sorted(unknown)} is not of this fit, of {sorted(known)}'
    )
  return _form(fit.kind, fit.points.and_then(points), fit.shared, fit.units)


def in_units(
  fit: Fit, theta: Array, parameters: float, tokens: float
) -> tuple[Form, Array]:
  """The form and theta (..., P) of a fit with N and D in other units."""
  form = _form(fit.kind, fit.points, fit.shared, (parameters, tokens))
  theta, names = np.array(theta), form.names
  for exponent, coefficient, shift in (
    ('alpha', 'A', np.log(fit.units[0] / parameters)),
    ('beta', 'B', np.log(fit.units[1] / tokens)),
  ):
    for n, name in enumerate(names):
      if name.partition('[')[0] == coefficient:
        theta[..., n] += shift * theta[..., _column(names, exponent, name)]
  return form, theta


def natural(form: Form, theta: Array) -> Array:
  """Constants (..., P) as laws have them, from theta."""
  logs = [not name.startswith(('alpha', 'beta')) for name in form.names]
  with np.errstate(over='ignore'):  # inf is what an interval may end at
    return np.where(logs, np.exp(np.where(logs, theta, 0)), theta)


def law_of(fit: Fit, theta: Array, family: str) -> Law:
  """The law of a family whose constants are theta (P) in the fit's units."""
  form, theta = in_units(fit, theta, 1.0, 1.0)
  value = natural(form, theta)
  own = {
    name: float(value[_column(form.names, name, f'[{family}]')])
    for name in _CONSTANTS[fit.kind]
  }
  counted = fit.points.counted
  if fit.kind == 'power':
    return laws.PowerLaw(**own, counted=counted)
  gamma = own.pop('gamma', None)
  law = laws.ChinchillaLaw(**own, counted=counted)
  return law if gamma is None else laws.BitsLaw(law, gamma)


def _fit(
  kind: Kind, points: Points, shared: Collection[str], delta: float
) -> Fit:
  names = _CONSTANTS[kind]
  if unknown := set(shared) - set(names):
    raise ValueError(f'shared={sorted(unknown)}: constants are {names}')
  if not delta > 0:
    raise ValueError(f'delta={delta} must be > 0; inf is least squares')
  tokens = 'B' in names
  own = [name for name in names if name not in shared]
  families = list(dict.fromkeys(points.families))
  if len(families) > 1 and {'alpha', 'beta'} & set(own):
    for family in families:
      part = points.of_families({family})
      refuse_what_no_law_fits(part, len(own), tokens='beta' in own)
  units = _middle(points.parameters), _middle(points.tokens) if tokens else 1.0
  form = _form(kind, points, shared, units)
  refuse_what_no_law_fits(points, len(form.names), tokens)
  y_R = np.log(points.losses)
  starts = _starts(kind, points, form, units)
  theta, value = _best(form, starts, y_R, delta)
  shared = tuple(name for name in names if name in shared)
  return Fit(kind, shared, points, form, theta, units, delta, value)


def _middle(values_R: Array) -> float:
  return float(np.exp(np.mean(np.log(values_R))))


def _column(names: tuple[str, ...], name: str, like: str) -> int:
  """Where a constant is: of all, or of the family that `like` ends with."""
  return names.index(name if name in names else name + like[like.find('[') :])


def _form(
  kind: Kind,
  points: Points,
  shared: Collection[str],
  units: tuple[float, float],
) -> Form:
  names = _CONSTANTS[kind]
  families = list(dict.fromkeys(points.families))
  one = len(families) == 1
  every = tuple(dict.fromkeys(
    name if name in shared or one else f'{name}[{family}]'
    for name in names
    for family in families
  ))  # fmt: skip
  ones = np.ones(len(points))
  terms = {
    'E': (0, ones),
    'A': (1, ones),
    'alpha': (1, -np.log(points.parameters / units[0])),
    'B': (2, ones),
    'beta': (2, -np.log(points.tokens / units[1])),
  }
  design = np.zeros((len(points), 3 if 'B' in names else 2, len(every)))
  for name in names[:5]:
    term, value_R = terms[name]
    for family in families:
      mask = np.array([each == family for each in points.families])
      column = _column(every, name, f'[{family}]')
      design[mask, term, column] = value_R[mask]
  bits = [laws.BITS.get(family, np.nan) for family in points.families]
  return Form(every, design, np.array(bits) if kind == 'bits' else None)


def _starts(
  kind: Kind, points: Points, form: Form, units: tuple[float, float]
) -> Array:
  """Starts (S, P): of each family, the mean of families where shared."""
  total = np.zeros((_STARTS, len(form.names)))
  count = np.zeros(len(form.names))
  for family in dict.fromkeys(points.families):
    own = _grid(points.of_families({family}), kind != 'power', units)
    for n, name in enumerate(_CONSTANTS[kind][: own.shape[1]]):
      column = _column(form.names, name, f'[{family}]')
      total[:, column] += own[:, n]
      count[column] += 1
  starts = total / np.maximum(count, 1)
  if kind == 'bits':
    starts = np.repeat(starts, len(_GAMMAS), axis=0)
    starts[:, -1] = np.tile(np.log(_GAMMAS), _STARTS)
  return starts


def _grid(points: Points, tokens: bool, units: tuple[float, float]) -> Array:
  """The best (S, P) of a grid of exponents, for one family.

  Losses over a loss differ as their logs do, to first order, and are linear
  in E, A and B.
  """
  x_R, y_R = np.log(points.parameters / units[0]), np.log(points.losses)
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
  inverse = np.linalg.pinv(basis / points.losses[:, None])
  # A term cannot be negative; where it is best so, let it be small.
  found = np.maximum(inverse.sum(-1), 1e-3 * points.losses.mean())
  residual = np.log(np.einsum('grt,gt->gr', basis, found)) - y_R
  best = np.argsort((residual**2).sum(-1))[:_STARTS]
  log = np.log(found[best])
  theta = [log[:, 0], log[:, 1], alpha[best]]
  if tokens:
    theta += [log[:, 2], beta[best]]
  return np.stack(theta, -1)


def _best(
  form: Form, starts_SP: Array, y_R: Array, delta: float
) -> tuple[Array, float]:
  """The least minimum (P) from S starts.

  Least squares go first: Huber's loss with a delta below the noise has kinks
  all over.
  """
  ones = np.ones((1, len(y_R)))
  theta, value = minimize(form, starts_SP, y_R[None], ones, SQUARES)
  if delta < SQUARES:
    theta, value = minimize(form, theta, y_R[None], ones, delta)
  best = value.argmin()
  return theta[best], float(value[best])
