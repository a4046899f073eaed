# SPDX-License-Identifier: Apache-2.0
"""How far to trust the laws of a table, in words and tables."""

import math

import numpy as np

from tritera_jax.pictures import short
from tritera_jax.scaling.report import markdown
from tritera_jax.scaling.report.analysis import Analysis


def doubts(analysis: Analysis, family: str) -> list[str]:
  """What speaks against a law; the sections below have the numbers."""
  fit, fitted = analysis.primary[family], analysis.families[family]
  found = []
  for name, (low, high), least in (
    ('N', fitted.sizes, 10),
    ('D', fitted.budgets, 4),
  ):
    if high < least * low:
      found.append(f'{name} spans only {high / low:.2g} x')
  noise = analysis.noise
  if noise is None:
    found.append('noise is not known, no configuration has two seeds')
  elif (times := np.ptp(np.log(fit.points.losses)) / noise.relative) < 10:
    found.append(f'its effects are only {times:.2g} times the noise of seeds')
  lack = analysis.lack_of_fit[family]
  if lack is not None and lack.p < 0.05:
    found.append(f'it misses by more than seeds explain (p = {lack.p:.1g})')
  for axis, held in analysis.held_out[family].items():
    if isinstance(held, str):
      found.append(f'extrapolation by {axis} cannot be tested')
    elif held.score > 2 * held.fit.noise:
      found.append(
        f'fitted without the largest {axis} it misses them by '
        f'{held.score:.2%}, '
        f'{held.score / held.fit.noise:.2g} times its residuals'
      )
  constants = analysis.constants[analysis.options.counted][family]
  for name in ('alpha', 'beta'):
    each = constants[name]
    if not (math.isfinite(each.high) and each.high < 2 * each.low):
      found.append(f'{name} is {markdown.interval(each)}')
  return found


def section(analysis: Analysis) -> str:
  """How far to trust it."""
  words = [_noise(analysis)]
  rows = []
  for family, fit in analysis.primary.items():
    lack = analysis.lack_of_fit[family]
    effect = np.ptp(np.log(fit.points.losses))
    rows.append(
      [
        family,
        f'{fit.noise:.2%}',
        f'{np.max(np.abs(fit.residuals)):.2%}',
        '-'
        if lack is None
        else f'{lack.ratio:.3g} (F of {lack.degrees[0]} and {lack.degrees[1]} '
        f'degrees, p = {lack.p:.1g})',
        '-'
        if analysis.noise is None
        else f'{effect / analysis.noise.relative:.0f}',
      ]
    )
  words.append(
    markdown.table(
      [
        'family',
        'residuals (sd)',
        'largest residual',
        'variance about the law of least squares over that of seeds',
        'spread of log loss over the sd of seeds',
      ],
      rows,
    )
  )
  if analysis.by_squares:
    words.append(_by_squares(analysis))
  words.append(markdown.picture('residuals'))
  words.append(
    'Extrapolation: the law fitted without the largest N, or D, foretells '
    'those runs.'
  )
  words.append(_held_out(analysis))
  words.append(
    'Influence: the run whose absence moves an exponent most, of all runs '
    'left out in turn.'
  )
  words.append(_influence(analysis))
  return '\n\n'.join(words)


def _noise(analysis: Analysis) -> str:
  if analysis.noise is None:
    return (
      'No configuration was run with two seeds: how much of a residual is '
      'noise is not known.'
    )
  return (
    f'Seeds vary log losses by {analysis.noise.relative:.2%} (standard '
    f'deviation, {analysis.noise.degrees} degrees of freedom over all '
    'families).'
  )


def _by_squares(analysis: Analysis) -> str:
  """What another loss than Huber's would say."""
  delta = analysis.options.delta
  far = ', '.join(
    f'{family} {analysis.primary[family].noise / delta:.0f} times'
    for family in analysis.by_squares
  )
  words = [
    f'{family} has alpha {markdown.interval(constants["alpha"])} and beta '
    f'{markdown.interval(constants["beta"])}'
    for family, constants in analysis.by_squares.items()
  ] + [
    f'at equal {what} {crossed.after} is lower all along'
    if crossed.at is None
    else f'at equal {what} they cross at {short(crossed.at.estimate)}'
    for what, crossed in analysis.crossings_by_squares.items()
  ]
  return (
    f"Residuals (sd) are far above Huber's delta = {delta:g} ({far}): the fit "
    'is close to one of least absolute differences. By least squares '
    + '; '.join(words)
    + '.'
  )


def _held_out(analysis: Analysis) -> str:
  rows = []
  for family, by_axis in analysis.held_out.items():
    for axis, held in by_axis.items():
      what = f'largest {"N" if axis == "parameters" else "D"}'
      if isinstance(held, str):
        rows.append([family, what, '-', held, ''])
        continue
      rows.append(
        [
          family,
          what,
          len(held.points),
          f'{held.score:.2%}',
          f'{held.inside} of {len(held.points)}',
        ]
      )
  return markdown.table(
    ['family', 'left out', 'runs', 'error (rms)', 'in their intervals'], rows
  )


def _influence(analysis: Analysis) -> str:
  rows = []
  for family, left in analysis.left_out.items():
    constants = analysis.primary[family].constants()
    for name in ('alpha', 'beta'):
      moved = left.constants[:, left.names.index(name)]
      n = int(np.argmax(np.abs(moved - constants[name])))
      rows.append(
        [
          family,
          name,
          f'{constants[name]:.3g}',
          f'{moved[n]:.3g} without {left.runs[n]}',
          f'{moved.min():.3g} to {moved.max():.3g}',
        ]
      )
  return markdown.table(
    ['family', 'exponent', 'all runs', 'furthest', 'range'], rows
  )
