# SPDX-License-Identifier: Apache-2.0
"""Dynamics of runs as words, JSON and pictures."""

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from tritera_jax import pictures
from tritera_jax.scaling.dynamics.deceleration import Deceleration
from tritera_jax.scaling.dynamics.files import Checkpoint, Dynamics
from tritera_jax.scaling.dynamics.interference import Interference, Projections

_LINES = '-', '--', ':', '-.'


def text(run: Dynamics) -> str:
  """The law, and a line for each checkpoint."""
  rows = [
    f'deceleration: {run.deceleration or f"none: {run.no_deceleration}"}',
    '',
    '            held out   until 2 step       next update                '
    'gradients, and projections on that update',
    f'{"step":>8} {"nats":>10}   {"D":>6} {"M":>7}   {"D":>6} {"M":>8} '
    f'{"corr.":>6}   {"D":>6} {"Cg":>6} {"Cug":>6} {"CuG":>6} {"Ci":>6}',
  ]
  for c in run.checkpoints:
    D, M = ('', '') if c.doubling is None else c.doubling[:2]
    D_one, M_one = ('', '') if c.one_step is None else c.one_step[:2]
    rows.append(
      f'{c.step:>8,} {c.held_out_loss:>10.4f}   '
      f'{_number(D, 6, 3)} {_number(M, 7, 4)}   '
      f'{_number(D_one, 6, 3)} {_number(M_one, 8, 5)} '
      f'{_number(c.correlation, 6, 2)}   {_number(c.gradient_D, 6, 3)} '
      + ' '.join(_number(value, 6, 3) for value in c.projections)
    )
  return '\n'.join(rows)


def _number(value: float | str, width: int, places: int) -> str:
  if isinstance(value, str) or math.isnan(value):
    return ' ' * (width - 1) + '-'
  return f'{value:>{width}.{places}f}'


def write(runs: Mapping[str, Dynamics], out: str | Path) -> list[Path]:
  """Writes dynamics.json, and deceleration and interference as PNG and SVG.

  Without deceleration, where no run has kept two steps.

  Args:
    runs: by the names that they are to have.
    out: folder.

  Returns:
    What was written.
  """
  from matplotlib.figure import Figure  # slow to import

  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  file = out / 'dynamics.json'
  record = {name: _record(run) for name, run in runs.items()}
  file.write_text(json.dumps(record, indent=2, allow_nan=False) + '\n')
  written = [file]
  with pictures.style():
    if curves := {n: run for n, run in runs.items() if len(run.steps) > 1}:
      figure = Figure()
      _draw_losses(figure.subplots(), curves)
      written += pictures.save(figure, out / 'deceleration')
    else:  # no picture of another call stays
      for suffix in ('.png', '.svg'):
        (out / f'deceleration{suffix}').unlink(missing_ok=True)
    figure = Figure(figsize=(7.5, 4.9))
    _draw_interference(figure.subplots(2, 3), runs)
    figure.legend(
      handles=figure.axes[0].get_legend_handles_labels()[0],
      loc='outside lower left',
      ncols=1 + (len(runs) > 1),
      handlelength=4,
    )
    figure.legend(
      handles=_projection_lines(), loc='outside lower right', ncols=2,
      handlelength=4, title='projections', title_fontsize=8,
    )  # fmt: skip
    written += pictures.save(figure, out / 'interference')
  return written


def _record(value: Any) -> Any:
  """JSON, with null for NaN, and what is derived of a law beside it."""
  if isinstance(value, Interference | Projections):
    return _record(value._asdict())
  if isinstance(value, Deceleration | Checkpoint | Dynamics):
    fields: dict[str, Any] = {
      f.name: getattr(value, f.name) for f in dataclasses.fields(value)
    }
    if isinstance(value, Deceleration):
      fields |= {
        't_d': value.t_d,
        'L_d': value.L_d,
        'r_d': value.r_d,
        'extrapolated_loss': value.extrapolated(value.steps),
        'errors': value.errors,
      }
    return _record(fields)
  if isinstance(value, dict):
    return {name: _record(one) for name, one in value.items()}
  if isinstance(value, tuple):
    return [_record(one) for one in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _draw_losses(axes, runs: Mapping[str, Dynamics]):
  for (name, run), line in zip(runs.items(), _LINES * len(runs), strict=False):
    colour, law = pictures.COLOURS[run.family], run.deceleration
    axes.plot(
      run.steps, run.losses, color=colour, lw=3, alpha=0.25,
      label=name if law is None else None,
    )  # fmt: skip
    if law is None:
      continue
    steps = np.geomspace(run.steps[0], run.steps[-1], 200)
    axes.plot(steps, law.loss(steps), color=colour, ls=line, label=(
      f'{name}: $t_d$ = {law.t_d:,.0f} ± {law.errors["t_d"]:,.0f}, '
      f'$r_d$ = {law.r_d:.3f}'
    ))  # fmt: skip
    ends = np.array([run.steps[0], law.t_d, run.steps[-1]])
    corner = law.L_d * (ends / law.t_d) ** np.array([-law.c0, 0, -law.r_d])
    axes.plot(ends, corner, color=colour, lw=1, ls=':')
    axes.errorbar(
      law.t_d, law.L_d, xerr=law.errors['t_d'], yerr=law.errors['L_d'],
      color=colour, marker=pictures.MARKERS[run.family], capsize=2,
    )  # fmt: skip
  axes.set(
    xscale='log', yscale='log', xlabel='step',
    ylabel='training loss (nats a token)',
  )  # fmt: skip
  pictures.count_ticks(axes.xaxis)
  _loss_ticks(axes.yaxis)
  axes.legend()


def _loss_ticks(axis):
  from matplotlib import ticker

  axis.set_major_locator(ticker.MaxNLocator(8, steps=[1, 2, 5, 10]))
  axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
  axis.set_minor_locator(ticker.NullLocator())


def _draw_interference(grid, runs: Mapping[str, Dynamics]):
  (D, M, change), (gradients, histogram, projections) = grid
  panels = {
    'until twice the step': (lambda c: c.doubling, '-', None),
    'by the next update': (lambda c: c.one_step, '--', 'white'),
  }
  for name, run in runs.items():
    colour, marker = (
      pictures.COLOURS[run.family],
      pictures.MARKERS[run.family],
    )
    style: dict[str, Any] = {'color': colour, 'marker': marker, 'ms': 3}
    for what, (of, line, face) in panels.items():
      points = [(c.step, of(c)) for c in run.checkpoints if of(c) is not None]
      if not points:
        continue
      steps, values = zip(*points, strict=True)
      label = f'{name}, {what}'
      for axes, y in (
        (D, [v.D for v in values]),
        (M, [v.M for v in values]),
        (change, [abs(v.change) for v in values]),
      ):
        axes.plot(steps, y, ls=line, label=label, mfc=face, **style)
    steps = [c.step for c in run.checkpoints]
    gradients.plot(steps, [c.gradient_D for c in run.checkpoints], **style)
    for field, line in zip(Projections._fields, _LINES, strict=True):
      values = [getattr(c.projections, field) for c in run.checkpoints]
      projections.plot(steps, values, ls=line, lw=1.2, color=colour)
    for last in run.checkpoints[-1:]:
      histogram.stairs(
        np.array(last.histogram) / max(sum(last.histogram), 1),
        np.linspace(0, 1, 101),
        color=colour,
        label=f'{name}, step {last.step:,}',
      )
    if run.deceleration is not None:
      for axes in (D, M, change, gradients, projections):
        axes.axvline(run.deceleration.t_d, color=colour, lw=0.8, ls=':')
  for axes in (D, M, change, gradients, projections):
    axes.set(xscale='log', xlabel='step')
    pictures.count_ticks(axes.xaxis)
  for axes in (M, change, projections):
    axes.set(yscale='log')
  D.set(title='interference D of losses')
  M.set(title='magnitude M of changes (nats)')
  change.set(title='|mean change| (nats)')
  gradients.set(title='interference D of gradients')
  histogram.set(
    title='coordinates by $1 - D_j$', xlabel='$1 - D_j$', yscale='log',
    xlim=(0, None),
  )  # fmt: skip
  projections.set(title='projections on the update')
  histogram.legend(fontsize=7)


def _projection_lines() -> list[Any]:
  from matplotlib.lines import Line2D

  return [
    Line2D([], [], color='0.3', lw=1.2, ls=line, label=field)
    for field, line in zip(Projections._fields, _LINES, strict=True)
  ]
