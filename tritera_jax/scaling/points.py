# SPDX-License-Identifier: Apache-2.0
"""Losses to fit a law to, and what is asked of them first."""

from collections.abc import Collection, Iterable, Sequence
import dataclasses

import numpy as np
from numpy.typing import NDArray

from tritera_jax.scaling.laws import Counted, Numbers
from tritera_jax.scaling.runs import Run


@dataclasses.dataclass(frozen=True)
class Points:
  """Losses of runs, arrays of one length (R,) in one order.

  Attributes:
    names: of runs.
    families: of their weights.
    parameters: N as `counted` says, in ones.
    tokens: D, in ones; NaN where nobody said.
    losses: nats a token.
    counted: the parameters that are N.
    seeds: of runs; None where nobody said.
  """

  names: tuple[str, ...]
  families: tuple[str, ...]
  parameters: NDArray[np.float64]
  tokens: NDArray[np.float64]
  losses: NDArray[np.float64]
  counted: Counted
  seeds: tuple[int | None, ...]

  def __post_init__(self):
    for field in ('parameters', 'tokens', 'losses'):
      for name, value in zip(self.names, getattr(self, field), strict=True):
        unsaid = field == 'tokens' and np.isnan(value)
        if not (0 < value < np.inf or unsaid):
          raise ValueError(
            f'{field}={value} of run {name!r} must be a number above 0: '
            'leave the run out'
          )

  def __len__(self) -> int:
    return len(self.names)

  @classmethod
  def of_runs(cls, runs: Iterable[Run], counted: Counted) -> 'Points':
    """Final held-out losses of runs.

    Raises:
      ValueError: two are of one cell and seed, or scored on other text.
    """
    runs = list(runs)
    _refuse_copies(runs)
    _refuse_other_text(runs)
    field = {
      'all': 'parameters',
      'without_embeddings': 'parameters_without_embeddings',
    }[counted]
    return cls(
      tuple(run.name for run in runs),
      tuple(run.family for run in runs),
      np.array([getattr(run, field) for run in runs], float),
      np.array([run.tokens for run in runs], float),
      np.array([run.held_out_loss for run in runs], float),
      counted,
      tuple(run.seed for run in runs),
    )

  @classmethod
  def of_arrays(
    cls, parameters: Numbers, losses: Numbers, *, family: str,
    counted: Counted, tokens: Numbers = float('nan'),
  ) -> 'Points':  # fmt: skip
    """Losses of one family, from elsewhere: numbers in ones, broadcast."""
    N_R, D_R, loss_R = (
      np.ravel(each)
      for each in np.broadcast_arrays(
        np.asarray(parameters, float),
        np.asarray(tokens, float),
        np.asarray(losses, float),
      )
    )
    names = tuple(f'{family}_{n}' for n in range(len(loss_R)))
    R = len(loss_R)
    return cls(names, (family,) * R, N_R, D_R, loss_R, counted, (None,) * R)

  def take(self, keep: Sequence | np.ndarray) -> 'Points':
    """Those of a mask or of indices (R,)."""
    index = np.arange(len(self))[np.asarray(keep)]
    return dataclasses.replace(
      self,
      names=tuple(self.names[n] for n in index),
      families=tuple(self.families[n] for n in index),
      parameters=self.parameters[index],
      tokens=self.tokens[index],
      losses=self.losses[index],
      seeds=tuple(self.seeds[n] for n in index),
    )

  def and_then(self, more: 'Points') -> 'Points':
    """These, and then others.

    Raises:
      ValueError: they count other parameters.
    """
    if more.counted != self.counted:
      raise ValueError(
        f'N counts parameters {self.counted!r} here and {more.counted!r} '
        'there: count them alike'
      )
    return dataclasses.replace(
      self,
      names=self.names + more.names,
      families=self.families + more.families,
      parameters=np.append(self.parameters, more.parameters),
      tokens=np.append(self.tokens, more.tokens),
      losses=np.append(self.losses, more.losses),
      seeds=self.seeds + more.seeds,
    )

  def of_families(self, families: Collection[str]) -> 'Points':
    """Those of some families."""
    return self.take([family in families for family in self.families])


@dataclasses.dataclass(frozen=True)
class Noise:
  """How much the loss of one configuration varies from seed to seed.

  Attributes:
    relative: standard deviation of log losses: 0.005 is half a per cent.
    degrees: of freedom that it rests on, repeats less configurations.
  """

  relative: float
  degrees: int


def seed_noise(points: Points) -> Noise | None:
  """Pooled over runs that repeat a family, N and D with another seed.

  None where none does. Losses equal to the last digit are copies, no repeats.
  """
  cells: dict[tuple, dict[int, float]] = {}
  for n, (family, *size, loss, seed) in enumerate(
    zip(
      points.families, points.parameters, points.tokens, points.losses,
      points.seeds, strict=True,
    )
  ):  # fmt: skip
    # Where nobody said, each run has a seed of its own.
    own = -1 - n if seed is None else seed
    cells.setdefault((family, *size), {}).setdefault(own, float(np.log(loss)))
  repeats = [
    list(cell.values())
    for cell in cells.values()
    if len(set(cell.values())) > 1
  ]
  degrees = sum(len(cell) - 1 for cell in repeats)
  if not degrees:
    return None
  squares = sum(len(cell) * np.var(cell) for cell in repeats)
  return Noise(float(np.sqrt(squares / degrees)), degrees)


def _refuse_copies(runs: Sequence[Run]):
  seen: dict[tuple, str] = {}
  for run in runs:
    cell = (
      run.family, run.parameters, run.parameters_without_embeddings,
      run.tokens, run.seed,
    )  # fmt: skip
    if (other := seen.setdefault(cell, run.name)) != run.name:
      raise ValueError(
        f'runs {other!r} and {run.name!r} are the same cell: {run.family}, '
        f'parameters={run.parameters}, tokens={run.tokens}, seed={run.seed}; '
        'leave one out'
      )


def _refuse_other_text(runs: Sequence[Run]):
  """Losses on other held-out tokens, or of another tokenizer's."""
  first = next((run for run in runs if run.held_out is not None), None)
  for run in runs:
    if first and run.held_out not in (None, first.held_out):
      raise ValueError(
        f'run {run.name!r} was scored on held_out={run.held_out}, '
        f'{first.name!r} on {first.held_out}: other text or another tokenizer; '
        'make a report of each'
      )


def refuse_what_no_law_fits(points: Points, constants: int, tokens: bool):
  """Raises where runs cannot tell the constants of a law apart.

  Args:
    points: of one family, or of several that share a law.
    constants: that the law has.
    tokens: whether it has a term of tokens.

  Raises:
    ValueError: too few runs, sizes or budgets, or tokens that follow size.
  """
  if len(points) < constants + 1:
    raise ValueError(
      f'{len(points)} runs for a law of {constants} constants: it takes at '
      f'least {constants + 1} (finish more runs, or fit a law with fewer)'
    )
  axes = {'parameters': points.parameters}
  if tokens:
    axes['tokens'] = points.tokens
    unsaid = np.isnan(points.tokens)
    if unsaid.any():
      raise ValueError(
        f'tokens of run {points.names[int(np.argmax(unsaid))]!r} are not '
        'known: a law of tokens needs them'
      )
  for name, values in axes.items():
    distinct = len(np.unique(values))
    if distinct < 3:
      raise ValueError(
        f'{name} of the runs have {distinct} distinct value'
        f'{"s" * (distinct > 1)}: a coefficient, an exponent and E are told '
        'apart by three or more'
      )
  if tokens:
    _refuse_tokens_that_follow_size(points)


def _refuse_tokens_that_follow_size(points: Points):
  x_R, y_R = np.log(points.parameters), np.log(points.tokens)
  slope, offset = np.polyfit(x_R, y_R, 1)
  apart = np.max(np.abs(y_R - slope * x_R - offset))
  if apart < 0.05:  # D is a function of N within 5 %
    ratio = np.exp(np.mean(y_R - x_R))
    what = (
      f'D/N is {ratio:.3g} in every run'
      if abs(slope - 1) < 0.05
      else f'D goes as N^{slope:.2f} in every run'
    )
    raise ValueError(
      f'{what}: what size does cannot be told from what data does; add runs '
      'with other tokens at one size'
    )
