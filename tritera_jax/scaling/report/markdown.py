# SPDX-License-Identifier: Apache-2.0
"""Tables, numbers and pictures as report.md has them."""

from collections.abc import Callable, Iterable, Sequence
import math

from tritera_jax.pictures import short
from tritera_jax.scaling.intervals import Interval
from tritera_jax.scaling.plan import LEVEL

_LAW = (
  'Points are runs. Lines are the law, dashed beyond the runs; bands hold '
  f'{LEVEL:.0%} of draws.'
)
_PICTURES = {
  'tokens': f'Loss against tokens D, a line for each N. {_LAW}',
  'parameters': f'Loss against parameters N, a line for each D. {_LAW}',
  'compute': (
    'Contours of the loss by the law, and the best N and D for each compute, '
    f'with the band that holds {LEVEL:.0%} of draws. Points are runs.'
  ),
  'residuals': 'Log losses of runs less those of their laws.',
  'families': (
    f'Families at equal parameters and at equal bytes served. {_LAW} The cross '
    "is the best fit's last crossing; the grey range holds as much of the "
    'draws that cross, whose share stands in each panel.'
  ),
}


def interval(interval: Interval, form: Callable = '{:.3g}'.format) -> str:
  """An estimate with its ends; ? where there are no draws."""
  if interval.high - interval.low < 1e-6 * abs(interval.estimate):
    return form(interval.estimate)
  low, high = (
    form(end) if math.isfinite(end) else '?' if math.isnan(end) else 'no bound'
    for end in (interval.low, interval.high)
  )
  return f'{form(interval.estimate)} ({low} to {high})'


def beyond(times: float) -> str:
  """How many times outside the runs."""
  return f'{times:.3g} x' if times > 1.001 else 'no'


def span(values: Sequence[int]) -> str:
  """Smallest, largest and their ratio."""
  return (
    f'{short(min(values))} to {short(max(values))} '
    f'({max(values) / min(values):.3g} x)'
  )


def picture(name: str) -> str:
  """A picture of the report with its caption."""
  return f'![{_PICTURES[name]}]({name}.png)\n\n*{_PICTURES[name]}*'


def table(head: Iterable[str], rows: Iterable[Sequence]) -> str:
  """A table of cells as they print."""
  lines = [list(head), *rows]
  lines.insert(1, ['---'] * len(lines[0]))
  return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
