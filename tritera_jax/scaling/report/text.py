# SPDX-License-Identifier: Apache-2.0
"""A report in words and tables, of an `analysis.Analysis`."""

import dataclasses
import math

from tritera_jax.pictures import short
from tritera_jax.scaling import families, plan
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.plan import Choice
from tritera_jax.scaling.readings import Readings
from tritera_jax.scaling.report import markdown, trust
from tritera_jax.scaling.report.analysis import IN_BITS, Analysis

_COUNTED = {'all': 'all', 'without_embeddings': 'without embeddings'}
# Of 100 tables drawn from a law, in how many 90 % intervals held the truth:
# experiments/recovery.py, both families.
_COVERED = {
  'huber': {
    'profile': '90.5 to 93', 'runs': '94.5 to 97', 'residuals': '80.5 to 87.5',
  },
  'squares': {
    'profile': '90.5 to 92.5', 'runs': '89 to 92.5', 'residuals': '85.5 to 91',
  },
}  # fmt: skip


def report(analysis: Analysis, digest: str) -> str:
  """The whole of report.md."""
  sections = [
    ('# Scaling laws of this table', _head(analysis, digest)),
    ('## In short', _short(analysis)),
    ('## Data or parameters', _data_or_parameters(analysis)),
    ('## How far to trust it', trust.section(analysis)),
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
        *map(markdown.span, (sizes, bodies, tokens)),
        f'{max(losses):.3f} to {min(losses):.3f}',
      ]
    )
  table = markdown.table(
    [
      'family', 'runs', 'seeds', 'N, all', 'N, without embeddings', 'D',
      'held-out loss (nats a token)',
    ],
    rows,
  )  # fmt: skip
  options = analysis.options
  squares = math.isinf(options.delta)
  covered = _COVERED['squares' if squares else 'huber']
  loss = (
    'least squares'
    if squares
    else f"Huber's loss with delta = {options.delta:g}"
  )
  warning = f' Beware: {options.warning}.' if options.warning else ''
  return (
    f'{len(analysis.runs)} runs, sha256 {digest[:12]}. L(N, D) = E + A / '
    'N^alpha + B / D^beta in nats a token, D in tokens, fitted to log losses '
    f'by {loss}. Intervals are to hold {plan.LEVEL:.0%}: of constants by '
    f'profile likelihood, of all else by {options.draws} bootstrap draws of '
    f'{options.resample}. Of tables drawn from a law the former held '
    f'{covered["profile"]} % and the latter {covered[options.resample]} % '
    f'(`experiments/recovery.py`).{warning} N is counted '
    f'{_COUNTED[options.counted]} unless it is said otherwise.\n\n{table}\n\n'
    f'{markdown.picture("tokens")}\n\n{markdown.picture("parameters")}'
  )


def _short(analysis: Analysis) -> str:
  words = [
    f'* No law of {family}: {analysis.refused[family]}.'
    for family in dict.fromkeys(analysis.points.families)
    if family not in analysis.families
  ]
  words += [_verdict(*each) for each in analysis.readings.items()]
  for what, compared in analysis.compared.items():
    within = [row for row in compared.rows if row.beyond < 1.001]
    if within:
      last = within[-1]
      words.append(
        f'* At equal {what}, {short(last.at)} of them and '
        f'{short(analysis.common_tokens)} tokens, ternary has the lower loss '
        f'in {last.wins:.0%} of draws.'
      )
  for family in analysis.families:
    doubts = trust.doubts(analysis, family)
    words.append(
      f'* Trust in the law of {family}: '
      + ('; '.join(doubts) or 'within the runs nothing speaks against it')
      + '.'
    )
  return '\n'.join(words)


def _data_or_parameters(analysis: Analysis) -> str:
  rows = [
    [
      family,
      *map(markdown.interval, (said.ratio, said.parameters_exponent)),
      *map(markdown.interval, (said.gain_of_parameters, said.gain_of_tokens)),
      *map(markdown.interval, (said.double_parameters, said.double_tokens)),
      f'{said.share_for_parameters:.0%}',
    ]
    for family, said in analysis.readings.items()
  ]
  table = markdown.table(
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
    'more depends on where one is. Gains are nats a token at the run that took '
    f'the most FLOPs ({points}).\n\n{table}\n\n' + markdown.picture('compute')
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


def _laws(analysis: Analysis) -> str:
  parts = [
    'E, A and B in nats a token, N in millions, D in billions; gamma in bits '
    'a weight (laws.BitsLaw).'
  ]
  columns = ('E', 'A', 'alpha', 'B', 'beta', 'gamma')
  for counted, by_name in analysis.constants.items():
    rows = []
    for name, constants in by_name.items():
      fit = analysis.fits[counted][name]
      for family in [''] if fit.kind == 'bits' else fit.families:
        own = [
          constants.get(each) or constants.get(f'{each}[{family}]')
          for each in columns
        ]
        rows.append(
          [
            ' '.join(dict.fromkeys((name, family))).strip(),
            *('-' if each is None else markdown.interval(each) for each in own),
          ]
        )
    parts.append(
      f'### N {_COUNTED[counted]}\n\n' + markdown.table(['law', *columns], rows)
    )
  families_of_bits = {
    len(fits[IN_BITS].families)
    for fits in analysis.fits.values()
    if IN_BITS in fits
  }
  if 2 in families_of_bits:
    parts.append(
      'With two families gamma is one free number, which multiplies the N of '
      'one of them: that the law in bits fits says nothing of bits.'
    )
  parts += [
    f'Not fitted: {name}. {why}.' for name, why in analysis.refused.items()
  ]
  return '\n\n'.join(parts)


def _families(analysis: Analysis) -> str:
  if not analysis.compared:
    return (
      'The table does not allow a law of both families: nothing to compare.'
    )
  tokens = short(analysis.common_tokens)
  parts = [
    f'After {tokens} tokens, the most that runs of every size have seen.',
    markdown.picture('families'),
  ]
  for what, compared in analysis.compared.items():
    rows = [
      [
        short(row.at),
        *map(markdown.interval, row.losses.values()),
        f'{row.wins:.0%}',
        markdown.beyond(row.beyond),
      ]
      for row in compared.rows
    ]
    parts.append(
      markdown.table(
        [
          'bytes served' if what == 'bytes' else 'N',
          'ternary',
          'float',
          'draws in which ternary is lower',
          'beyond the runs',
        ],
        rows,
      )
    )
    words = _crossing(what, compared.crossing)
    if other := analysis.crossings_by_squares.get(what):
      words += f' {_by_squares(other)}'
    parts.append(words)
  return '\n\n'.join(parts)


def _crossing(what: str, crossed: families.Crossing) -> str:
  range_ = f'up to {families.FURTHEST:g} times the largest model'
  if crossed.at is None:
    return (
      f'At equal {what} {crossed.after} is lower all along, {range_}; they '
      f'cross in {crossed.share:.0%} of draws.'
    )
  at = markdown.interval(crossed.at, short)
  at += f' in the {crossed.share:.0%} of draws that cross'
  at += f', the last of {crossed.count} times' if crossed.count > 1 else ''
  return (
    f'At equal {what} they cross at {at}, at {crossed.loss:.3f} nats a '
    f'token; {crossed.before} is lower just before, {crossed.after} after '
    f'({range_}).'
  )


def _by_squares(crossed: families.Crossing) -> str:
  if crossed.at is None:
    return f'By least squares {crossed.after} is lower all along.'
  return f'By least squares they cross at {short(crossed.at.estimate)}.'


def _plans(analysis: Analysis) -> str:
  parts = []
  for words, budget, choices in analysis.plans:
    asked = ', '.join(
      f'{field.name} {getattr(budget, field.name):.3g}'
      for field in dataclasses.fields(budget)
      if getattr(budget, field.name) is not None
    )
    if isinstance(choices, str):
      parts.append(f'For {words} ({asked}): {choices}.')
      continue
    none = [
      f' No {family} model is so small.'
      for family in analysis.families
      if family not in {choice.family for choice in choices}
    ]
    parts.append(
      f'For {words} ({asked}):{"".join(none)}\n\n'
      + markdown.table(
        [
          'family',
          'N',
          'D',
          'loss (nats a token)',
          'training FLOPs',
          'bytes served',
          'J a token',
          'draws it is best in',
          'beyond the runs',
        ],
        [_choice(choice) for choice in choices],
      )
    )
  return '\n\n'.join(parts)


def _choice(choice: Choice) -> list[str]:
  return [
    choice.family,
    markdown.interval(choice.parameters, short),
    markdown.interval(choice.tokens, short),
    markdown.interval(choice.loss),
    f'{choice.training_flops:.3g}',
    short(choice.served_bytes),
    f'{choice.joules_per_token:.3g}',
    f'{choice.wins:.0%}',
    markdown.beyond(choice.beyond),
  ]


def _assumptions(analysis: Analysis) -> str:
  shapes, serving = analysis.shapes, analysis.serving
  rows = [
    [field.name, f'{getattr(serving, field.name):g}']
    for field in dataclasses.fields(serving)
  ]
  return (
    f'Training a token takes {shapes.flops_per_body:.3g} FLOPs for each '
    f'parameter and {shapes.flops_per_embedding:.3g} for each of embedding and '
    f'head (within {shapes.worst:.1%} of the runs); embedding and head have '
    f'{shapes.embeddings.coefficient:.3g} n^{shapes.embeddings.exponent:.3g} '
    f'parameters for n in the rest (within {shapes.embeddings.worst:.1%}). '
    'Both are held to beyond the runs.\n\nServing, all of it assumed '
    '(`tritera_jax/scaling/costs.py` gives the sources; no cache of keys and '
    'values, no leakage, no host):\n\n'
    + markdown.table(['assumed', 'value'], rows)
  )
