# SPDX-License-Identifier: Apache-2.0
"""How every picture looks: one style file, one colour a family.

matplotlib is imported when something is drawn: it takes half a second.
"""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import matplotlib.axis
  import matplotlib.figure

_STYLE = Path(__file__).with_name('paper.mplstyle')

# Okabe and Ito's blue, vermilion and bluish green; the markers tell the
# families apart in print without colour.
COLOURS = {'ternary': '#0072B2', 'float': '#D55E00', 'binary': '#009E73'}
MARKERS = {'ternary': 'o', 'float': 's', 'binary': '^'}

_SUFFIXES = ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K'))


@contextlib.contextmanager
def style() -> Iterator[None]:
  """Figures made, drawn and saved inside look as paper.mplstyle says.

  matplotlib's own settings come back at the end, whatever the user's were.
  """
  import matplotlib

  with matplotlib.rc_context(fname=_STYLE):
    yield


def save(figure: 'matplotlib.figure.Figure', stem: Path) -> list[Path]:
  """Writes `stem`.png and `stem`.svg, inside `style`; the same bytes again."""
  kinds = {'.png': {'Software': None}, '.svg': {'Date': None}}
  for suffix, metadata in kinds.items():
    figure.savefig(stem.with_suffix(suffix), metadata=metadata)
  return [stem.with_suffix(suffix) for suffix in kinds]


def short(number: int | float) -> str:
  """A count in three digits: 1.15B, 300B, 99.7M, 512."""
  for unit, suffix in _SUFFIXES:
    if number >= 0.9995 * unit:
      return f'{number / unit:.3g}{suffix}'
  return f'{number:.3g}'


def count_ticks(axis: 'matplotlib.axis.Axis'):
  """Labels a logarithmic axis with counts, 10M or 1B; its limits are set.

  An axis shorter than three decades gets ticks within them too.
  """
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  subs = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
  axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
  axis.set_major_formatter(ticker.FuncFormatter(lambda x, _: short(x)))
  axis.set_minor_formatter(ticker.NullFormatter())
