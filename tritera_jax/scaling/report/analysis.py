# SPDX-License-Identifier: Apache-2.0
"""Everything that a report says of a table of runs, before it is words."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any, Literal

import numpy as np

from tritera_jax import pictures
from tritera_jax.scaling import checks, intervals, laws, plan, readings
from tritera_jax.scaling import families as families_lib
from tritera_jax.scaling import fit as fit_lib
from tritera_jax.scaling.checks import HeldOut, LackOfFit, LeftOut
from tritera_jax.scaling.costs import Serving, Shapes
from tritera_jax.scaling.families import Compared, Crossing
from tritera_jax.scaling.fit import Fit
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.laws import Counted
from tritera_jax.scaling.plan import Array, Budget, Choice, Fitted
from tritera_jax.scaling.points import Noise, Points, seed_noise
from tritera_jax.scaling.readings import Readings
from tritera_jax.scaling.runs import Run

_FEWEST = 20  # draws
_FAR = 5.0  # residuals over delta: Huber's loss is no longer near squares
SHARED_E = 'one E for all'
IN_BITS = 'one law in bits'


@dataclasses.dataclass(frozen=True)
class Options:
  """How a table is analysed.

  Attributes:
    counted: the parameters that are N in pictures and plans; constants are
      given for both counts.
    delta: of Huber's loss, in log losses.
    draws: of the bootstrap, for whatever is no constant of a law.
    seed: of it.
    resample: runs, or residuals of the fitted law.
  """

  counted: Counted = 'without_embeddings'
  delta: float = 1e-3
  draws: int = 400
  seed: int = 0
  resample: Literal['runs', 'residuals'] = 'runs'

  def __post_init__(self):
    if not self.delta > 0:
      raise ValueError(f'delta={self.delta} must be > 0; inf is least squares')
    if self.draws < _FEWEST:
      raise ValueError(
        f'draws={self.draws} must be at least {_FEWEST}: of fewer no interval '
        'can be told'
      )
    if self.seed < 0:
      raise ValueError(f'seed={self.seed} must be >= 0')

  @property
  def warning(self) -> str:
    """What is known to be wrong with them, if anything."""
    if self.resample == 'residuals' and math.isfinite(self.delta):
      return (
        "resample=residuals with Huber's loss has intervals that are too "
        'narrow: take runs, or delta=inf'
      )
    return ''


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What is known of a table.

  Attributes:
    options: how it was made.
    serving: what was assumed of serving.
    runs: the table.
    points: its losses, N as options.counted says.
    noise: of seeds, if any configuration was repeated.
    shapes: of its models.
    fits: by count of parameters, then by family or joint law.
    constants: of each fit, N in millions and D in billions, with intervals.
    refused: why a law was not fitted, by its name.
    families: laws of options.counted, with draws.
    lack_of_fit: of each family; None without repeats.
    held_out: of each family by 'parameters' and by 'tokens'; or why not.
    left_out: of each family.
    by_squares: alpha and beta by least squares of each family whose residuals
      are far above delta.
    crossings_by_squares: of ternary and float, where either is so.
    readings: of each family, at its largest run.
    frontiers: FLOPs (C,) and the best N of law and draws (1 + K, C).
    common_tokens: D at which families are compared, as runs of every size have.
    compared: ternary and float, as 'parameters' and as 'bytes' grow.
    plans: what was asked and the best model of each family, or why none.
  """

  options: Options
  serving: Serving
  runs: list[Run]
  points: Points
  noise: Noise | None
  shapes: Shapes
  fits: dict[Counted, dict[str, Fit]]
  constants: dict[Counted, dict[str, dict[str, Interval]]]
  refused: dict[str, str]
  families: dict[str, Fitted]
  lack_of_fit: dict[str, LackOfFit | None]
  held_out: dict[str, dict[str, HeldOut | str]]
  left_out: dict[str, LeftOut]
  by_squares: dict[str, dict[str, Interval]]
  crossings_by_squares: dict[str, Crossing]
  readings: dict[str, Readings]
  frontiers: dict[str, tuple[Array, Array]]
  common_tokens: float
  compared: dict[str, Compared]
  plans: list[tuple[str, Budget, list[Choice] | str]]

  @property
  def primary(self) -> dict[str, Fit]:
    """Fits of the families by themselves, N as options.counted says."""
    fits = self.fits[self.options.counted]
    return {name: fits[name] for name in self.families}


def analyse(
  runs: Sequence[Run],
  options: Options = Options(),
  serving: Serving = Serving(),
  budget: Budget = Budget(),
) -> Analysis:
  """Fits every law that the runs allow and asks what it says.

  The order of the runs is nothing: they are sorted first.

  Raises:
    ValueError: no family's runs allow a law: why, by family.
  """
  runs = sorted(runs, key=_order)
  if not runs:
    raise ValueError('no law can be fitted: there are no runs')
  fits, constants, refused = {}, {}, {}
  for counted in ('without_embeddings', 'all'):
    points = Points.of_runs(runs, counted)
    fits[counted], why = _fits(points, options.delta)
    refused |= why
    constants[counted] = {
      name: intervals.profile(
        fit, level=plan.LEVEL, parameters=laws.MILLION, tokens=laws.BILLION
      )
      for name, fit in fits[counted].items()
    }
  points = Points.of_runs(runs, options.counted)
  families = {
    name: fitted(fit, _bootstrap(fit, options))
    for name, fit in fits[options.counted].items()
    if name in points.families
  }
  if not families:
    raise ValueError(
      'no law can be fitted: '
      + '; '.join(f'{name}: {why}' for name, why in refused.items())
    )
  primary = {name: fits[options.counted][name] for name in families}
  shapes = Shapes.of_runs(runs, options.counted)
  pair = {n: families[n] for n in ('ternary', 'float') if n in families}
  common_tokens = families_lib.common_tokens((pair or families).values())
  noise = seed_noise(points)
  squares = {
    name: fit_lib.again(fit, fit.points, fit_lib.SQUARES)
    for name, fit in primary.items()
  }
  far = [n for n, fit in primary.items() if fit.noise > _FAR * fit.delta]
  return Analysis(
    options,
    serving,
    runs,
    points,
    noise,
    shapes,
    fits,
    constants,
    refused,
    families,
    {name: checks.lack_of_fit(fit, noise) for name, fit in primary.items()},
    {name: _held_out(fit) for name, fit in primary.items()},
    {name: checks.leave_one_out(fit) for name, fit in primary.items()},
    {name: intervals.profile(squares[name], level=plan.LEVEL) for name in far},
    {
      what: each.crossing
      for what, each in families_lib.compare(
        {name: fitted(squares[name], np.empty((0, 5))) for name in pair},
        shapes,
        serving,
        common_tokens,
      ).items()
    }
    if len(pair) > 1 and set(pair) & set(far)
    else {},
    {name: _readings(each, shapes) for name, each in families.items()},
    {name: _frontier(each, shapes) for name, each in families.items()},
    common_tokens,
    families_lib.compare(pair, shapes, serving, common_tokens)
    if len(pair) > 1
    else {},
    [
      (words, asked, _best(families, asked, shapes, serving))
      for words, asked in _budgets(points, families, shapes, serving, budget)
    ],
  )


def _order(run: Run) -> tuple:
  return run.family, run.parameters, run.tokens, run.seed, run.name


def _fits(
  points: Points, delta: float
) -> tuple[dict[str, Fit], dict[str, str]]:
  """By name; and why others were refused."""
  fits, refused = {}, {}

  def attempt(name: str, make: Callable[[], Fit]):
    try:
      fits[name] = make()
    except ValueError as error:
      refused[name] = str(error)

  for family in (each for each in pictures.COLOURS if each in points.families):
    own = points.of_families({family})
    attempt(family, functools.partial(fit_lib.chinchilla, own, delta=delta))
  if len(fits) > 1:
    all_of_them = points.of_families(set(fits))
    attempt(
      SHARED_E,
      functools.partial(
        fit_lib.chinchilla, all_of_them, shared=('E',), delta=delta
      ),
    )
    attempt(
      IN_BITS, functools.partial(fit_lib.in_bits, all_of_them, delta=delta)
    )
  return fits, refused


def fitted(fit: Fit, theta_KP: Array) -> Fitted:
  """A family's law with draws of its constants, in the fit's units."""
  (family,) = fit.families
  # One of N and D, as chinchilla fits.
  of: Any = functools.partial(fit_lib.law_of, fit, family=family)
  return Fitted(
    of(fit.theta),
    tuple(of(theta) for theta in theta_KP),
    fit.points.parameters,
    fit.points.tokens,
  )


def _bootstrap(fit: Fit, options: Options) -> Array:
  """Of a family, independent of the other families' draws."""
  (family,) = fit.families
  return intervals.bootstrap(
    fit,
    draws=options.draws,
    seed=(options.seed, list(pictures.COLOURS).index(family)),
    resample=options.resample,
  )


def _best(
  families: Mapping[str, Fitted],
  budget: Budget,
  shapes: Shapes,
  serving: Serving,
) -> list[Choice] | str:
  """Or why there is none."""
  try:
    return plan.best(families, budget, shapes, serving)
  except ValueError as error:
    return str(error)


def _held_out(fit: Fit) -> dict[str, HeldOut | str]:
  held: dict[str, HeldOut | str] = {}
  for axis in ('parameters', 'tokens'):
    try:
      held[axis] = checks.held_out(fit, axis, level=plan.LEVEL)
    except ValueError as error:
      held[axis] = str(error)
  return held


def _readings(family: Fitted, shapes: Shapes) -> Readings:
  law: Any = family.law
  draws: Any = family.draws
  return readings.readings(law, draws, *family.largest(shapes))


def _frontier(family: Fitted, shapes: Shapes) -> tuple[Array, Array]:
  """From a hundredth of the smallest run's compute to a hundred largest."""
  N, D = np.asarray(family.parameters), np.asarray(family.tokens)
  of_run = shapes.flops_per_token(N) * D
  flops = np.geomspace(np.min(of_run) / 100, np.max(of_run) * 100, 41)
  return flops, plan.frontier(family, shapes, flops)


def _budgets(
  points: Points,
  families: Mapping[str, Fitted],
  shapes: Shapes,
  serving: Serving,
  asked: Budget,
) -> list[tuple[str, Budget]]:
  """What a plan is made for, in words: more compute, equal bytes and energy."""
  of_run = shapes.flops_per_token(points.parameters) * points.tokens
  largest = float(max(of_run))
  family = next(iter(families))
  N, tokens = families[family].largest(shapes)
  words = f'the largest {family} run, on {pictures.short(tokens)} tokens'
  budgets = [
    ('the compute of the largest run', Budget(training_flops=largest)),
    ('10 times that', Budget(training_flops=10 * largest)),
    ('100 times that', Budget(training_flops=100 * largest)),
    (
      f'the bytes of {words}',
      Budget(
        served_bytes=float(serving.bytes(family, shapes, N)), tokens=tokens
      ),
    ),
    (
      f'the joules a token of {words}',
      Budget(
        joules_per_token=float(serving.joules_per_token(family, shapes, N)),
        tokens=tokens,
      ),
    ),
  ]
  return budgets + ([('what was asked', asked)] if asked != Budget() else [])
