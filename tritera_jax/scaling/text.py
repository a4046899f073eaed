# SPDX-License-Identifier: Apache-2.0
"""A report in words and tables, of an `analysis.Analysis`."""

from collections.abc import Iterable, Sequence
import dataclasses
import math

import numpy as np

from tritera_jax.pictures import short
from tritera_jax.scaling import families, plan
from tritera_jax.scaling.analysis import Analysis
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.plan import Choice
from tritera_jax.scaling.readings import Readings

_COUNTED = {'all': 'all', 'without_embeddings': 'without embeddings'}
_PICTURES = {
  'tokens': 'Loss against tokens. Dashed: beyond the runs.',
  'parameters': 'Loss against parameters.',
  'compute': 'Loss by law, and the best size for each compute.',
  'residuals': 'What the laws miss.',
  'families': 'Families at equal parameters and at equal bytes served.',
}


def report(analysis: Analysis, digest: str) -> str:
  """The whole of report.md."""
  sections = [
    ('# Scaling laws of this table', _head(analysis, digest)),
    ('## Data or parameters', _data_or_parameters(analysis)),
    ('## How far to trust it', _trust(analysis)),
    ('## Laws', _laws(analysis)),
    ('## Ternary against float', _families(analysis)),
    ('## What to train next', _plans(analysis)),
    ('## Assumptions', _assumptions(analysis)),
  ]
  return '\n\n'.join(f'{title}\n\n{body}' for title, body in sections) + '\n'


def _head(analysis: Analysis, digest: str) -> str:
  rows = []
  for family in dict.fromkeys(analysis.points.families):
    own = [run for run in analysis.runs if run.family == family]
    sizes = [run.parameters for run in own]
    bodies = [run.parameters_without_embeddings for run in own]
    tokens = [run.tokens for run in own]
    losses = [run.held_out_loss for run in own]
    rows.append(
      [
        family,
        len(own),
        len({run.seed for run in own}),
        *map(_span, (sizes, bodies, tokens)),
        f'{max(losses):.3f} to {min(losses):.3f}',
      ]
    )
  table = _table(
    [
      'family', 'runs', 'seeds', 'N, all', 'N, without embeddings', 'D',
      'held-out loss (nats a token)',
    ],
    rows,
  )  # fmt: skip
  return (
    f'{len(analysis.runs)} runs, sha256 {digest[:12]}. L(N, D) = E + A / '
    'N^alpha + B / D^beta in nats a token, D in tokens. Intervals hold '
    f'{plan.LEVEL:.0%}: of constants by profile likelihood, of all else by '
    f'{analysis.options.draws} bootstrap draws of {analysis.options.resample}.'
    f' N is counted {_COUNTED[analysis.options.counted]} unless it is said '
    f'otherwise.\n\n{table}\n\n{_picture("tokens")}\n\n{_picture("parameters")}'
  )


def _data_or_parameters(analysis: Analysis) -> str:
  rows = [
    [
      family,
      *map(_interval, (said.ratio, said.parameters_exponent)),
      *map(_interval, (said.gain_of_parameters, said.gain_of_tokens)),
      *map(_interval, (said.double_parameters, said.double_tokens)),
      f'{said.share_for_parameters:.0%}',
    ]
    for family, said in analysis.readings.items()
  ]
  table = _table(
    [
      'family', 'beta / alpha', 'p of N ~ C^p', '-dL/dlogN', '-dL/dlogD',
      'gain of 2 N', 'gain of 2 D', 'draws in which N gains more',
    ],
    rows,
  )  # fmt: skip
  points = '; '.join(
    f'{family}: N = {short(said.parameters)}, D = {short(said.tokens)}'
    for family, said in analysis.readings.items()
  )
  return (
    'The exponents can be read in two ways, and both stand here. The first '
    '(2506.23025): the larger exponent names what helps more. The second, '
    'what the law says: a term with a large exponent is soon used up, so at C '
    '= 6 N D the best N grows as C^(beta / (alpha + beta)), and what helps '
    'more depends on where one is. Gains are nats a token at the largest N '
    f'and D of the runs ({points}).\n\n{table}\n\n'
    + '\n'.join(_verdict(*each) for each in analysis.readings.items())
    + f'\n\n{_picture("compute")}'
  )


def _verdict(family: str, said: Readings) -> str:
  first = _sides(said.ratio, 1.0, 'data', 'parameters')
  share = said.share_for_parameters
  sure = (1 + plan.LEVEL) / 2
  second = (
    'parameters' if share >= sure else 'data' if share <= 1 - sure else None
  )
  words = f'* **{family}**: by exponents, {first or "undecided"}; by gains at '
  words += f'the largest run, {second or "undecided"}.'
  if first and second:
    words += ' They agree.' if first == second else ' They disagree.'
  p = said.parameters_exponent
  grows = _sides(p, 0.5, 'parameters faster than data', 'data faster')
  return words + (
    f' With more compute, {grows}.'
    if grows
    else ' With more compute, which grows faster is undecided.'
  )


def _sides(interval: Interval, at: float, above: str, below: str) -> str | None:
  if not interval.low <= at <= interval.high:
    return above if interval.estimate > at else below
  return None


def _trust(analysis: Analysis) -> str:
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
        '-' if lack is None else f'{lack.ratio:.2g} (p = {lack.p:.2g})',
        '-'
        if analysis.noise is None
        else f'{effect / analysis.noise.relative:.0f}',
      ]
    )
  words.append(
    _table(
      [
        'family',
        'residuals (sd)',
        'largest residual',
        'variance about the law over that of seeds',
        'spread of log loss over the sd of seeds',
      ],
      rows,
    )
  )
  words.append(_picture('residuals'))
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
    f'deviation, {analysis.noise.degrees} degrees of freedom).'
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
  return _table(
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
  return _table(['family', 'exponent', 'all runs', 'furthest', 'range'], rows)


def _laws(analysis: Analysis) -> str:
  parts = [
    'E, A and B in nats a token, N in millions, D in billions; gamma in bits '
    'a weight (laws.BitsLaw).'
  ]
  for counted, by_name in analysis.constants.items():
    rows = [
      [name, constant, _interval(interval)]
      for name, constants in by_name.items()
      for constant, interval in constants.items()
    ]
    parts.append(
      f'### N {_COUNTED[counted]}\n\n'
      + _table(['law', 'constant', 'estimate'], rows)
    )
  parts += [
    f'Not fitted: {name}. {why}.' for name, why in analysis.refused.items()
  ]
  return '\n\n'.join(parts)


def _families(analysis: Analysis) -> str:
  if not analysis.compared:
    return (
      'The table does not allow a law of both families: nothing to compare.'
      f'\n\n{_picture("families")}'
    )
  tokens = short(analysis.largest_tokens)
  parts = [f'After {tokens} tokens.', _picture('families')]
  for what, compared in analysis.compared.items():
    rows = [
      [
        short(row.at),
        *map(_interval, row.losses.values()),
        f'{row.wins:.0%}',
        _beyond(row.beyond),
      ]
      for row in compared.rows
    ]
    parts.append(
      _table(
        [
          'bytes served' if what == 'bytes' else 'N',
          'ternary',
          'float',
          'draws in which ternary is lower',
          '',
        ],
        rows,
      )
    )
    parts.append(_crossing(what, compared.crossing))
  return '\n\n'.join(parts)


def _crossing(what: str, crossed: families.Crossing) -> str:
  range_ = f'up to {families.FURTHEST:g} times the largest model'
  if crossed.at is None:
    return (
      f'At equal {what} {crossed.after} is lower all along, {range_}; they '
      f'cross in {crossed.share:.0%} of draws.'
    )
  return (
    f'At equal {what} they cross at {_interval(crossed.at, short)} and '
    f'{crossed.loss:.3f} nats a token, {crossed.before} being lower before '
    f'and {crossed.after} after; {crossed.share:.0%} of draws cross ({range_}).'
  )


def _plans(analysis: Analysis) -> str:
  parts = []
  for words, budget, choices in analysis.plans:
    asked = ', '.join(
      f'{field.name} {getattr(budget, field.name):.3g}'
      for field in dataclasses.fields(budget)
      if getattr(budget, field.name) is not None
    )
    parts.append(
      f'For {words} ({asked}):\n\n'
      + _table(
        [
          'family',
          'N',
          'D',
          'loss (nats a token)',
          'training FLOPs',
          'bytes served',
          'J a token',
          'draws it is best in',
          '',
        ],
        [_choice(choice) for choice in choices],
      )
    )
  return '\n\n'.join(parts)


def _choice(choice: Choice) -> list[str]:
  return [
    choice.family,
    _interval(choice.parameters, short),
    _interval(choice.tokens, short),
    _interval(choice.loss),
    f'{choice.training_flops:.3g}',
    short(choice.served_bytes),
    f'{choice.joules_per_token:.3g}',
    f'{choice.wins:.0%}',
    _beyond(choice.beyond),
  ]


def _assumptions(analysis: Analysis) -> str:
  shapes, serving = analysis.shapes, analysis.serving
  rows = [
    [field.name, f'{getattr(serving, field.name):g}']
    for field in dataclasses.fields(serving)
  ]
  return (
    f'Training takes {shapes.flops_per_token.coefficient:.3g} N^'
    f'{shapes.flops_per_token.exponent:.3g} FLOPs a token (within '
    f'{shapes.flops_per_token.worst:.1%} of the runs); embedding and head have '
    f'{shapes.embeddings.coefficient:.3g} n^{shapes.embeddings.exponent:.3g} '
    f'parameters for n in the rest (within {shapes.embeddings.worst:.1%}). '
    'Both are held to beyond the runs.\n\nServing, all of it assumed '
    '(`tritera_jax/scaling/costs.py` gives the sources; no cache of keys and '
    f'values, no leakage, no host):\n\n{_table(["assumed", "value"], rows)}'
  )


def _interval(interval: Interval, form=lambda value: f'{value:.3g}') -> str:
  low, high = (
    form(end) if math.isfinite(end) else 'no bound' if end == math.inf else '?'
    for end in (interval.low, interval.high)
  )
  return f'{form(interval.estimate)} ({low} to {high})'


def _beyond(times: float) -> str:
  return f'{times:.2g} x beyond the runs' if times > 1.001 else ''


def _span(values: Sequence[float]) -> str:
  return (
    f'{short(min(values))} to {short(max(values))} '
    f'({max(values) / min(values):.3g} x)'
  )


def _picture(name: str) -> str:
  return f'![{_PICTURES[name]}]({name}.png)\n\n*{_PICTURES[name]}*'


def _table(head: Iterable[str], rows: Iterable[Sequence]) -> str:
  lines = [list(head), *rows]
  lines.insert(1, ['---'] * len(lines[0]))
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
