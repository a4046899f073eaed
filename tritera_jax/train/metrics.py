# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: JSON lines, one record a logged step, and their picture.

`metrics.jsonl` is the truth; everything printed or drawn comes from it.
"""

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from tritera_jax import pictures
from tritera_jax.model import quantized
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary import stats

if TYPE_CHECKING:
  import matplotlib.figure


class MetricsFile:
  """Appends records to a run's metrics.jsonl."""

  def __init__(self, folder: Path, from_step: int):
    """Keeps the records up to `from_step`: later ones are about to come."""
    self.path = folder / 'metrics.jsonl'
    kept = [r for r in read(folder) if r['step'] <= from_step]
    partial = self.path.with_suffix('.partial')
    partial.write_text(''.join(json.dumps(r) + '\n' for r in kept))
    partial.rename(self.path)

  def write(self, record: dict):
    with self.path.open('a') as file:
      file.write(json.dumps(record) + '\n')


def read(folder: str | Path) -> list[dict]:
  """The records of a run so far; a line cut by a crash is left out."""
  path = Path(folder) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [json.loads(line) for line in lines[:-1] if line]


codes_and_scales = jax.jit(quantized.codes_and_scales, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _telemetry(config: ModelConfig, params, before):
  return {
    name: stats.stacked_stats(
      w_LKN,
      codes_LKN,
      scale_LS,
      config.linears[name].scale_axis,
      floor=config.scale_floor,
    )
    for name, w_LKN in quantized.latents(config, params).items()
    for codes_LKN, scale_LS in [before[name]]
  }


def telemetry(config: ModelConfig, params, before) -> dict:
  """`stats.matrix_stats` of the model, weighted by size, and by matrix.

  Args:
    config: of a ternary model.
    params: after an update.
    before: `codes_and_scales` before it.
  """
  by_name = jax.tree.map(float, _telemetry(config, params, before))
  size = {name: before[name][0].size for name in by_name}
  overall = {
    field: sum(size[n] * by_name[n][field] for n in by_name)
    / sum(size.values())
    for field in next(iter(by_name.values()))
  }
  return overall | {'matrices': by_name}


def line(record: dict) -> str:
  """One record in a few words."""
  parts = [f'loss {record["loss"]:.3f}']
  if 'held_out_loss' in record:
    parts.append(f'held-out {record["held_out_loss"]:.3f}')
  if 'tokens_per_second' in record:
    parts.append(f'{record["tokens_per_second"]:,.0f} tok/s')
  if 'mfu' in record:
    parts.append(f'MFU {record["mfu"]:.1%}')
  if record.get('data_share', 0) > 0.1:
    parts.append(f'waiting for data {record["data_share"]:.0%}')
  if 'zero_fraction' in record:
    parts.append(
      f'zeros {record["zero_fraction"]:.1%} flips {record["flip_fraction"]:.2%}'
    )
  return ', '.join(parts)


def plot(folder: str | Path) -> Path:
  """Draws loss.png of a run: training and held-out loss, and code flips."""
  path = Path(folder) / 'loss.png'
  with pictures.style():
    _draw(read(folder)).savefig(path)
  return path


def _draw(records: list[dict]) -> 'matplotlib.figure.Figure':
  from matplotlib.figure import Figure  # slow to import

  figure = Figure(figsize=(7, 4.5))
  axes = figure.subplots()

  def draw(axes, field, mean_of=1, **style):
    points = [(r['step'], r[field]) for r in records if field in r]
    if len(points) < mean_of:
      return False
    steps, values = np.transpose(points)
    window = np.full(mean_of, 1 / mean_of)
    axes.plot(
      np.convolve(steps, window, 'valid'),
      np.convolve(values, window, 'valid'),
      **style,
    )
    return True

  draw(axes, 'loss', color='C0', lw=1, alpha=0.3, label='loss of a batch')
  draw(axes, 'loss', mean_of=10, color='C0', label='mean of ten')
  draw(axes, 'held_out_loss', color='C1', marker='o', label='held-out loss')
  axes.set(xlabel='step', ylabel='loss (nats a token)')
  # DiLoCo's agreed weights stay as they are between agreements: no logarithm.
  if any(r.get('flip_fraction', 0) > 0 for r in records):
    twin = axes.twinx()
    draw(twin, 'flip_fraction', color='C2', lw=1, ls='--',
         label='codes flipped by one step')  # fmt: skip
    twin.set(ylabel='share of codes flipped by one step', yscale='log')
    twin.spines['right'].set_visible(True)
    twin.grid(False)
  # Above the axes, where it covers nothing.
  figure.legend(loc='outside upper left', ncols=4)
  return figure
