# SPDX-License-Identifier: Apache-2.0
"""What a training step takes on this machine: `tritera bench train`.

Each experiment's model and its twins of the other families train turn by turn
in one process, so that what disturbs the machine disturbs all of them; ratios
are those of a round, and their spread is shown. Tokens are random. First the
ways to lay a batch out (rows, remat) are tried with the experiment's own
family, and the one with the most tokens a second is taken for all.
"""

from collections.abc import Callable, Iterator
import dataclasses
import datetime
import itertools
import json
import os
from pathlib import Path
import platform
import statistics
import sys
import time

import jax

from tritera_jax import experiment_file
from tritera_jax.experiment import Experiment
from tritera_jax.model.attention import Kernel
from tritera_jax.model.decoder import Remat
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary.quantize import Family
from tritera_jax.train import metrics, throughput, timing
from tritera_jax.train.timing import Stepper

NAMES: dict[Family, str] = {
  'ternary': 'TriLM', 'float': 'FloatLM', 'binary': 'BiLM',
}  # fmt: skip
# Of --spectra: batches that keep one GPU of 80 GB or more busy.
_SPECTRA = ('99m', '390m', '1.1b')
_SPECTRA_ROWS = (8, 32)
_SPECTRA_REMATS: tuple[Remat, ...] = ('dots', 'block')
_SPECTRA_ATTENTIONS: tuple[Kernel, ...] = ('cudnn', 'xla')


@dataclasses.dataclass(frozen=True)
class Options:
  """How an experiment is timed.

  Attributes:
    rounds: each times every family once.
    steps: of a family in a round.
    families: beside the experiment's own.
    rows: batches to try, in sequences; empty: data.batch_size.
    remats: policies to try; empty: run.remat.
    attentions: to try; empty: run.attention.
    seconds: after which no further layout is tried, of each experiment.
  """

  rounds: int = 5
  steps: int = 5
  families: tuple[Family, ...] = ('float', 'binary')
  rows: tuple[int, ...] = ()
  remats: tuple[Remat, ...] = ()
  attentions: tuple[Kernel, ...] = ()
  seconds: float = 300.0

  def __post_init__(self):
    for name in ('rounds', 'steps'):
      if getattr(self, name) < 1:
        raise ValueError(f'--{name} {getattr(self, name)} must be >= 1')
    if any(rows < 1 for rows in self.rows):
      raise ValueError(f'--rows {self.rows} must all be >= 1')


def spectra(options: Options) -> tuple[Options, dict[str, Experiment]]:
  """Three sizes of the paper, and the layouts to try unless others are asked.

  Raises:
    FileNotFoundError: this is not run from the root of the project.
  """
  options = dataclasses.replace(
    options,
    rows=options.rows or _SPECTRA_ROWS,
    remats=options.remats or _SPECTRA_REMATS,
    attentions=options.attentions or _SPECTRA_ATTENTIONS,
  )
  names = [f'experiments/spectra.py:trilm_{size}' for size in _SPECTRA]
  return options, {name: experiment_file.load(name) for name in names}


def header() -> dict[str, str]:
  """How, where and when."""
  device = jax.devices()[0]
  return {
    'command': ' '.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    'date': datetime.date.today().isoformat(),
    'machine': f'{_processor()}, {os.cpu_count()} threads',
    'devices': f'{jax.device_count()} x {device.device_kind}',
    'jax': jax.__version__,
    **{k: os.environ[k] for k in ('XLA_FLAGS',) if k in os.environ},
  }


def _processor() -> str:
  # platform.processor() is 'x86_64' or nothing on Linux.
  path = Path('/proc/cpuinfo')
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.split(': ')[1] for line in lines if 'model name' in line]
  return (names or [platform.processor() or platform.machine()])[0]


def rows(name: str, experiment: Experiment, options: Options) -> Iterator[dict]:
  """A row for each layout that was tried, then one for each family.

  Args:
    name: of the experiment, in its rows.
    experiment: its mesh must fit this machine's devices.
    options: how it is timed.

  Raises:
    ValueError: the mesh or a batch does not fit, or no layout has room.
  """
  best, end = None, time.perf_counter() + options.seconds
  layouts = list(_layouts(experiment, options))
  for laid_out in layouts:
    if best and time.perf_counter() > end:
      yield _layout(name, laid_out) | {'skipped': 'no time left'}
      continue
    if len(layouts) == 1:
      best = (0.0, laid_out)
      break
    try:
      stepper = _stepper(laid_out)
      stepper.seconds(1)
      seconds = stepper.seconds(options.steps)
    except (RuntimeError, ValueError, NotImplementedError) as error:
      full = 'RESOURCE_EXHAUSTED' in str(error)
      if not full and laid_out.run.attention == 'xla':
        raise
      # cuDNN says what it cannot do when it is called.
      words = 'no room on the device' if full else str(error).split('\n')[0]
      yield _layout(name, laid_out) | {'skipped': words}
      continue
    row = _layout(name, laid_out) | _speed(laid_out, seconds)
    yield row | stepper.memory() | {'compile_seconds': stepper.compile_seconds}
    del stepper  # its state
    if best is None or row['tokens_per_second'] > best[0]:
      best = (row['tokens_per_second'], laid_out)
  if best is None:
    raise ValueError(
      f'{name}: no layout has room on {jax.devices()[0].device_kind}; give '
      'smaller --rows, or --remats block'
    )
  yield from _compared(name, best[1], options)


def _layouts(experiment: Experiment, options: Options) -> Iterator[Experiment]:
  for count, remat, attention in itertools.product(
    options.rows or (experiment.data.batch_size,),
    options.remats or (experiment.run.remat,),
    options.attentions or (experiment.run.attention,),
  ):
    yield dataclasses.replace(
      experiment,
      data=dataclasses.replace(experiment.data, batch_size=count),
      run=dataclasses.replace(experiment.run, remat=remat, attention=attention),
    )


def _layout(name: str, experiment: Experiment) -> dict:
  run = experiment.run
  return {
    'experiment': name,
    'family': experiment.model.family,
    'batch': experiment.data.batch_size,
    'accumulation': run.accumulation,
    'remat': run.remat,
    'attention': run.attention,
  }


def twin(experiment: Experiment, family: Family) -> Experiment:
  """The same but for what the weights of the blocks are.

  FloatLM has no codes to gather: XLA decides for it.
  """
  run = experiment.run
  if family == 'float' and run.gather == 'two_bit':
    run = dataclasses.replace(run, gather='auto')
  model = dataclasses.replace(experiment.model, family=family)
  return dataclasses.replace(experiment, model=model, run=run)


def _stepper(experiment: Experiment) -> Stepper:
  return Stepper(experiment, mesh_lib.make_mesh(experiment.mesh))


def _compared(
  name: str, experiment: Experiment, options: Options
) -> Iterator[dict]:
  """A row for each family; ratios are of rounds, own over the other's."""
  own = experiment.model.family
  families: list[Family] = list(dict.fromkeys((own, *options.families)))
  steppers: dict[Family, Stepper] = {
    f: _stepper(twin(experiment, f)) for f in families
  }
  times: dict[Family, list[float]] = {f: [] for f in families}
  updates: dict[Family, list[float]] = {f: [] for f in families}
  for stepper in steppers.values():
    stepper.seconds(2)
    stepper.optimizer_seconds()
  for _ in range(options.rounds):
    for family, stepper in steppers.items():
      times[family].append(stepper.seconds(options.steps))
      updates[family].append(stepper.optimizer_seconds())
  peak = timing.peak_bytes()
  for family, stepper in steppers.items():
    seconds = statistics.median(times[family])
    row = _layout(name, stepper.experiment) | {
      'rounds': options.rounds,
      'steps': options.steps,
      **_speed(stepper.experiment, seconds),
      'step_spread': _spread(times[family]),
      'optimizer_seconds': _spread(updates[family]),
      'compile_seconds': stepper.compile_seconds,
      **stepper.memory(),
    }
    if peak:
      row['peak_bytes_of_all'] = peak
    if family != own:
      row['own_over_this'] = _spread(
        [a / b for a, b in zip(times[own], times[family], strict=True)]
      )
    elif family != 'float':
      row['telemetry_seconds'] = _telemetry_seconds(stepper)
    yield row


def _speed(experiment: Experiment, seconds: float) -> dict:
  found = throughput.measures(experiment, 0, 1, seconds)
  return {k: v for k, v in found.items() if k != 'eta_seconds'}


def _spread(values: list[float]) -> dict[str, float]:
  return {
    'median': statistics.median(values),
    'min': min(values),
    'max': max(values),
  }


def _telemetry_seconds(stepper: Stepper) -> float:
  """Of one reading of ternary statistics, compiled."""
  model, params = stepper.experiment.model, stepper.state.params
  seconds = 0.0
  for _ in range(2):  # the first compiles
    started = time.perf_counter()
    before = metrics.codes_and_scales(model, params)
    metrics.telemetry(model, params, before)
    seconds = time.perf_counter() - started
  return seconds


def markdown(head: dict[str, str], found: list[dict]) -> str:
  """The rows as tables: families compared, then layouts tried."""
  compared = [row for row in found if 'rounds' in row]
  tried = [row for row in found if 'rounds' not in row]
  lines = ['# Training steps', '']
  lines += [f'* {key}: {value}' for key, value in head.items()]
  lines += [
    '',
    'MFU = 6 x (weights of matmuls + layers x T x width of attention) x '
    'tokens a second / peak;',
    'overhead = time of the row marked own / this row - 1; median, and least '
    'to most of the rounds.',
    '',
    '| experiment | family | batch | remat, attention | s/step | tokens/s | '
    'MFU | own over this | optimizer, s | state + temporaries |',
    '|---|---|---|---|---|---|---|---|---|---|',
  ]
  for row in compared:
    over = row.get('own_over_this')
    spread, optimizer = row['step_spread'], row['optimizer_seconds']
    cells = [
      row['experiment'],
      NAMES[row['family']],
      f'{row["batch"]}' + (f' in {row["accumulation"]}'
                           if row['accumulation'] > 1 else ''),
      f'{row["remat"]}, {row["attention"]}',
      f'{spread["median"]:.4g} ({spread["min"]:.4g} to {spread["max"]:.4g})',
      f'{row["tokens_per_second"]:,.0f}',
      f'{row["mfu"]:.1%}' if 'mfu' in row else '-',
      f'{over["median"] - 1:+.1%} ({over["min"] - 1:+.1%} to '
      f'{over["max"] - 1:+.1%})' if over else 'own',
      f'{optimizer["median"]:.3g}',
      f'{row["arguments"] / 1e9:.2f} + {row["temporaries"] / 1e9:.2f} GB',
    ]  # fmt: skip
    lines.append(f'| {" | ".join(cells)} |')
  if tried:
    lines += [
      '', 'Layouts tried, with the own family, once:', '',
      '| experiment | batch | remat, attention | s/step | tokens/s | MFU |',
      '|---|---|---|---|---|---|',
    ]  # fmt: skip
  for row in tried:
    speed = (
      [row['skipped'], '-', '-']
      if 'skipped' in row
      else [
        f'{row["step_seconds"]:.4g}',
        f'{row["tokens_per_second"]:,.0f}',
        f'{row["mfu"]:.1%}' if 'mfu' in row else '-',
      ]
    )
    how = f'{row["remat"]}, {row["attention"]}'
    cells = [row['experiment'], str(row['batch']), how, *speed]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def run(
  experiments: dict[str, Experiment],
  options: Options,
  out: Path | None,
  say: Callable[[str], None],
):
  """Times each, writes FOLDER/train.{jsonl,md} as rows come, prints the table.

  Args:
    experiments: by name.
    options: how they are timed.
    out: folder; None: print only.
    say: is told each row.
  """
  head, found = header(), []
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
  for name, experiment in experiments.items():
    for row in rows(name, experiment, options):
      found.append(row)
      say(json.dumps(row))
      if out is not None:
        lines = [json.dumps(item) for item in (head, *found)]
        (out / 'train.jsonl').write_text('\n'.join(lines) + '\n')
        (out / 'train.md').write_text(markdown(head, found))
  print(markdown(head, found))
