# SPDX-License-Identifier: Apache-2.0
"""Pictures of laws. Solid within the runs (Fitted.beyond), dashed beyond.

Bands hold plan.LEVEL of the draws. Every function returns a Figure, made inside
`pictures.style`.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tritera_jax import pictures
from tritera_jax.scaling import families as families_lib
from tritera_jax.scaling import plan
from tritera_jax.scaling.costs import Serving, Shapes
from tritera_jax.scaling.families import Compared
from tritera_jax.scaling.plan import Array, Fitted
from tritera_jax.scaling.points import Points

if TYPE_CHECKING:
  import matplotlib.figure

_COUNTED = {
  'all': 'parameters N, all of them',
  'without_embeddings': 'parameters N without embeddings',
}
_DASHES = (0, (4, 2))
_WITHIN = 1.02  # times beyond: less than the points of a curve lie apart
_BEYOND = 4.0  # times the largest run that a picture of a law goes to


def loss_against(
  axis: Literal['tokens', 'parameters'],
  points: Points,
  families: Mapping[str, Fitted],
  panels: Any = None,
) -> 'matplotlib.figure.Figure':
  """Loss against D for each N, or against N for each D; a panel a family.

  Args:
    axis: what grows.
    points: all runs.
    families: their laws.
    panels: axes to draw on, one a family, in place of a new figure's.
  """
  figure, panels = _panels(len(families), panels)
  other = 'parameters' if axis == 'tokens' else 'tokens'
  for panel, (family, fitted) in zip(panels, families.items(), strict=True):
    own = points.of_families({family})
    low, high = fitted.budgets if axis == 'tokens' else fitted.sizes
    x = np.geomspace(low / 1.3, high * _BEYOND, 120)
    values = np.unique(getattr(own, other))
    ends = []
    for n, value in enumerate(values):
      colour = _shade(family, n, len(values))
      at = {axis: x, other: value}
      table = fitted.table(at['parameters'], at['tokens'])
      beyond = fitted.beyond(at['parameters'], at['tokens'])
      _curve(panel, x, table, beyond, color=colour)
      here = getattr(own, other) == value
      panel.plot(
        getattr(own, axis)[here], own.losses[here], pictures.MARKERS[family],
        color=colour,
      )  # fmt: skip
      ends.append((float(table[0, -1]), pictures.short(float(value)), colour))
    panel.set(xscale='log', xlim=(x[0], x[-1]), title=family)
    _labels_at_end(panel, ends, {'tokens': 'N', 'parameters': 'D'}[axis])
    pictures.count_ticks(panel.xaxis)
    panel.set_xlabel(
      'tokens D' if axis == 'tokens' else _COUNTED[points.counted]
    )
  panels[0].set_ylabel('held-out loss (nats a token)')
  return figure


def compute_optimal(
  points: Points,
  families: Mapping[str, Fitted],
  frontiers: Mapping[str, tuple[Array, Array]],
  shapes: Shapes,
) -> 'matplotlib.figure.Figure':
  """Contours of loss over N and D with the best N for each compute.

  Args:
    points: all runs.
    families: their laws.
    frontiers: by family, FLOPs (C,) and the best N of law and draws (1 + K, C).
    shapes: of the models.
  """
  figure, panels = _panels(len(families), height=3.5)
  contours = []
  for panel, (family, fitted) in zip(panels, families.items(), strict=True):
    own, colour = points.of_families({family}), pictures.COLOURS[family]
    (d0, d1), (n0, n1) = fitted.budgets, fitted.sizes
    D = np.geomspace(d0 / 2, d1 * _BEYOND, 120)
    N = np.geomspace(n0 / 2, n1 * _BEYOND, 120)
    loss = np.asarray(fitted.law(N[:, None], D[None]))
    contours.append(
      panel.contour(D, N, loss, levels=8, colors='0.45', linewidths=0.7)
    )
    within = fitted.beyond(N[:, None], D[None]) < _WITHIN
    panel.fill_between(
      D,
      np.min(np.where(within, N[:, None], np.inf), axis=0),
      np.max(np.where(within, N[:, None], -np.inf), axis=0),
      where=within.any(0),
      color=colour, alpha=0.08, lw=0,
    )  # fmt: skip
    flops, best = frontiers[family]
    low, high = plan.ends(best[1:])
    tokens = [flops / shapes.flops_per_token(each) for each in (low, high)]
    panel.fill(
      np.concatenate([tokens[0], tokens[1][::-1]]),
      np.concatenate([low, high[::-1]]),
      color=colour, alpha=0.25, lw=0,
    )  # fmt: skip
    tokens = flops / shapes.flops_per_token(best[0])
    inside = fitted.beyond(best[0], tokens) < _WITHIN
    panel.plot(tokens, best[0], ls=_DASHES, lw=2, color=colour)
    panel.plot(
      np.where(inside, tokens, np.nan), best[0], '-', color=colour, lw=2
    )
    panel.plot(own.tokens, own.parameters, pictures.MARKERS[family],
               color='0.2', ms=3)  # fmt: skip
    panel.set(
      xscale='log', yscale='log', xlim=(D[0], D[-1]), ylim=(N[0], N[-1]),
      xlabel='tokens D', title=f'{family}: loss (nats a token)',
    )  # fmt: skip
    panel.grid(False)
    pictures.count_ticks(panel.xaxis)
    pictures.count_ticks(panel.yaxis)
  panels[0].set_ylabel(_COUNTED[points.counted])
  _legend(
    figure,
    runs=_line(marker='o', ls='', color='0.2', ms=3),
    within_the_runs=_patch(color='0.5', alpha=0.15),
    compute_optimal=_line(color='0.3', lw=2),
    **_band(),
    beyond_the_runs=_line(color='0.3', ls=_DASHES),
  )
  # Labels leave gaps of their own size, which the layout decides.
  figure.draw_without_rendering()
  figure.set_layout_engine('none')
  for panel, lines in zip(panels, contours, strict=True):
    panel.clabel(lines, fmt='%.2f', fontsize=6.5, inline_spacing=2)
  return figure


def residuals(
  points: Points,
  by_family: Mapping[str, Array],
  noise: float | None,
) -> 'matplotlib.figure.Figure':
  """100 times log loss less its law's, against N, D and loss.

  Args:
    points: all runs.
    by_family: log loss less its law's, of each family's runs.
    noise: standard deviation of log losses from seeds, if known.
  """
  figure, panels = _panels(3)
  for family, residual in by_family.items():
    own = points.of_families({family})
    for panel, x in zip(
      panels, (own.parameters, own.tokens, own.losses), strict=True
    ):
      panel.plot(
        x, 100 * residual, pictures.MARKERS[family],
        color=pictures.COLOURS[family],
      )  # fmt: skip
  handles = {
    family: _line(
      marker=pictures.MARKERS[family], ls='', color=pictures.COLOURS[family]
    )
    for family in by_family
  }
  for panel in panels:
    panel.axhline(0, color='0.3', lw=0.8)
    if noise is not None:
      panel.axhspan(-200 * noise, 200 * noise, color='0.5', alpha=0.15, lw=0)
  if noise is not None:
    handles['two standard deviations of seeds'] = _patch(
      color='0.5', alpha=0.15
    )
  for panel, label in zip(
    panels, (_COUNTED[points.counted], 'tokens D'), strict=False
  ):
    panel.set(xscale='log', xlabel=label)
    pictures.count_ticks(panel.xaxis)
  panels[2].set_xlabel('held-out loss (nats a token)')
  panels[0].set_ylabel('100 x log(observed / law)')
  _legend(figure, **handles)
  return figure


def families_compared(
  points: Points,
  families: Mapping[str, Fitted],
  shapes: Shapes,
  serving: Serving,
  tokens: float,
  compared: Mapping[str, Compared],
  panels: Any = None,
) -> 'matplotlib.figure.Figure':
  """Losses of families at equal parameters and at equal bytes served.

  Args:
    points: all runs.
    families: their laws.
    shapes: of the models.
    serving: what serving takes.
    tokens: D at which they are compared.
    compared: with the crossings; empty where there is no pair.
    panels: two axes to draw on, in place of a new figure's.
  """
  figure, panels = _panels(2, panels)
  for family, fitted in families.items():
    own = points.of_families({family})
    own = own.take(own.tokens == tokens)
    low, high = fitted.sizes
    N = np.geomspace(low / 1.5, high * families_lib.FURTHEST, 200)
    table, colour = fitted.table(N, tokens), pictures.COLOURS[family]
    beyond = fitted.beyond(N, tokens)
    for panel, cost in zip(
      panels, (_same, _bytes(serving, family, shapes)), strict=True
    ):
      _curve(panel, cost(N), table, beyond, color=colour)
      panel.plot(
        cost(own.parameters), own.losses, pictures.MARKERS[family], color=colour
      )
  for panel, what in zip(panels, ('parameters', 'bytes'), strict=True):
    crossed = compared[what].crossing if compared else None
    panel.set(xscale='log', title=f'at equal {what}')
    panel.set_xlim(panel.get_xlim())  # however wide the interval
    if crossed is not None and crossed.at is not None:
      panel.axvspan(crossed.at.low, crossed.at.high, color='0.5', alpha=0.15,
                    lw=0)  # fmt: skip
      panel.plot(crossed.at.estimate, crossed.loss, 'x', color='black', ms=7,
                 mew=1.5)  # fmt: skip
    if crossed is not None:
      panel.text(
        0.03, 0.03, f'{crossed.share:.0%} of draws cross', color='0.3',
        transform=panel.transAxes, fontsize=7,
      )  # fmt: skip
    pictures.count_ticks(panel.xaxis)
  panels[0].set(
    xlabel=_COUNTED[points.counted], ylabel='held-out loss (nats a token)'
  )
  panels[1].set_xlabel('bytes served, packed')
  _legend(
    figure,
    **{
      family: _line(
        marker=pictures.MARKERS[family], color=pictures.COLOURS[family]
      )
      for family in families
    },
    beyond_the_runs=_line(color='0.3', ls=_DASHES),
    **_band(),
    **(
      {'crossing': _line(marker='x', ls='', color='black', ms=7, mew=1.5)}
      if any(each.crossing.at for each in compared.values())
      else {}
    ),
  )
  figure.suptitle(f'after {pictures.short(tokens)} tokens', x=0.01, ha='left')
  return figure


def _same(parameters):
  return np.asarray(parameters, float)


def _bytes(serving: Serving, family: str, shapes: Shapes) -> Callable:
  return lambda parameters: serving.bytes(family, shapes, parameters)


def _panels(count: int, given: Any = None, height: float = 3.0) -> Any:
  """A figure and its axes in a row, unless they are given."""
  from matplotlib.figure import Figure

  if given is not None:
    return given[0].figure, given
  width = {1: 4.4, 2: 6.8}.get(count, 2.8 * count)
  figure = Figure(figsize=(width, height))
  return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _curve(panel: Any, x: Array, table: Array, beyond: Array, **style):
  """A law with its band, solid within the runs."""
  inside = beyond < _WITHIN
  panel.plot(x, table[0], ls=_DASHES, lw=1, **style)
  panel.plot(x, np.where(inside, table[0], np.nan), **style)
  if len(table) > 1:
    low, high = plan.ends(table[1:])
    panel.fill_between(x, low, high, alpha=0.15, lw=0, **style)


def _shade(family: str, n: int, count: int) -> str:
  """The family's colour, the n-th of some from light to dark."""
  from matplotlib import colors

  full = np.array(colors.to_rgb(pictures.COLOURS[family]))
  share = 0.45 + 0.75 * n / max(count - 1, 1)  # 1 is the colour itself
  shade = 1 - share * (1 - full) if share <= 1 else full * (2 - share)
  r, g, b = (float(each) for each in shade)
  return colors.to_hex((r, g, b))


def _labels_at_end(panel: Any, ends: list[tuple[float, str, Any]], what: str):
  """Names lines at their right ends, moved apart where they are too near."""
  low, high = panel.get_ylim()
  apart, at = 0.055 * (high - low), -np.inf
  for y, text, colour in sorted(ends, key=lambda each: each[0]):
    at = max(y, at + apart)
    panel.annotate(
      text, (1, y), (4, at), xycoords=('axes fraction', 'data'),
      textcoords=('offset points', 'data'), color=colour, va='center',
      fontsize=7, annotation_clip=False,
    )  # fmt: skip
  panel.annotate(
    what, (1, at + apart), (4, at + apart),
    xycoords=('axes fraction', 'data'), textcoords=('offset points', 'data'),
    va='center', fontsize=7, annotation_clip=False, color='0.3',
  )  # fmt: skip


def _line(**style) -> Any:
  from matplotlib.lines import Line2D

  return Line2D([], [], **style)


def _band() -> dict[str, Any]:
  return {f'{plan.LEVEL:.0%} of draws': _patch(color='0.3', alpha=0.25)}


def _patch(**style) -> Any:
  from matplotlib.patches import Patch

  return Patch(lw=0, **style)


def _legend(figure: Any, **handles):
  """Above the panels, where it covers nothing."""
  figure.legend(
    handles=list(handles.values()),
    labels=[name.replace('_', ' ') for name in handles],
    loc='outside upper right',
    ncols=len(handles),
  )
