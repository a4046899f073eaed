# SPDX-License-Identifier: Apache-2.0
"""`tritera scaling`: a folder that says what a table of runs says.

report.md for people, constants.json for programs, and pictures.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
from importlib import metadata
import json
import math
from pathlib import Path
import platform
import shutil
from typing import Any

from tritera_jax import pictures
from tritera_jax.scaling import plan
from tritera_jax.scaling import runs as runs_lib
from tritera_jax.scaling.costs import Serving
from tritera_jax.scaling.plan import Budget
from tritera_jax.scaling.report import analysis as analysis_lib
from tritera_jax.scaling.report import figures, text
from tritera_jax.scaling.report.analysis import Analysis, Options

_FORMAT = 'tritera scaling report 1'
_CONSTANTS = 'constants.json'
_UNITS = {
  'E': 'E_nats_per_token',
  'A': 'A_nats_per_token_for_N_in_millions',
  'alpha': 'alpha_of_N',
  'B': 'B_nats_per_token_for_D_in_billions',
  'beta': 'beta_of_D',
  'gamma': 'gamma_bits_per_weight',
}


def write(
  tables: Sequence[str | Path],
  out: str | Path,
  options: Options = Options(),
  serving: Serving = Serving(),
  budget: Budget = Budget(),
) -> Analysis:
  """Analyses tables and writes the report, whole or not at all.

  Args:
    tables: files or folders, as `runs.read` takes them.
    out: folder; a report of ours that is there is replaced.
    options: how it is analysed.
    serving: what serving is assumed to take.
    budget: one more to plan for, if it sets a limit.

  Raises:
    FileExistsError: `out` is there and is no report.
    ValueError: the tables allow no law.
  """
  out = Path(out)
  _refuse_what_is_no_report(out)
  runs = runs_lib.read(*tables)
  analysis = analysis_lib.analyse(runs, options, serving, budget)
  partial = out.with_name(f'{out.name}.partial')
  if partial.exists():
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  digest = _digest(runs)
  (partial / 'report.md').write_text(text.report(analysis, digest))
  (partial / _CONSTANTS).write_text(
    json.dumps(constants(analysis, digest), indent=2, allow_nan=False) + '\n'
  )
  with pictures.style():
    for name, figure in _figures(analysis):
      pictures.save(figure, partial / name)
  old = out.with_name(f'{out.name}.old')
  if out.exists():
    out.rename(old)
  partial.rename(out)
  shutil.rmtree(old, ignore_errors=True)
  return analysis


def _refuse_what_is_no_report(out: Path):
  if not out.exists():
    return
  try:
    ours = json.loads((out / _CONSTANTS).read_text())['format'] == _FORMAT
  except (OSError, ValueError, KeyError, TypeError):
    ours = False
  if not ours and not (out.is_dir() and not any(out.iterdir())):
    raise FileExistsError(
      f'out={out} is there and is no report of ours: name another folder'
    )


def _figures(analysis: Analysis):
  families, points = analysis.families, analysis.points
  yield 'tokens', figures.loss_against('tokens', points, families)
  yield 'parameters', figures.loss_against('parameters', points, families)
  yield (
    'compute',
    figures.compute_optimal(
      points, families, analysis.frontiers, analysis.shapes
    ),
  )
  yield (
    'residuals',
    figures.residuals(
      points,
      {name: fit.residuals for name, fit in analysis.primary.items()},
      None if analysis.noise is None else analysis.noise.relative,
    ),
  )
  if analysis.compared:
    yield (
      'families',
      figures.families_compared(
        points,
        families,
        analysis.shapes,
        analysis.serving,
        analysis.common_tokens,
        analysis.compared,
      ),
    )


def constants(analysis: Analysis, digest: str) -> dict[str, Any]:
  """What constants.json holds; None where there is no bound or no number."""
  held_out = {
    family: {
      axis: held
      if isinstance(held, str)
      else {
        'runs': held.points.names,
        'rms_error_of_log_loss': held.score,
        'in_their_intervals': int(held.inside),
      }
      for axis, held in by_axis.items()
    }
    for family, by_axis in analysis.held_out.items()
  }
  return _plain(
    {
      'format': _FORMAT,
      'table': {'sha256': digest, 'runs': len(analysis.runs)},
      'versions': {
        name: metadata.version(name)
        for name in ('tritera_jax', 'numpy', 'scipy')
      }
      | {'python': platform.python_version()},
      'level': plan.LEVEL,
      'options': analysis.options,
      'serving': analysis.serving,
      'laws': {
        f'N_{counted}': {
          name: {_in_units(key): value for key, value in values.items()}
          for name, values in by_name.items()
        }
        for counted, by_name in analysis.constants.items()
      },
      'refused': analysis.refused,
      'seed_noise_of_log_loss': analysis.noise,
      'residual_sd_of_log_loss': {
        name: fit.noise for name, fit in analysis.primary.items()
      },
      'lack_of_fit': analysis.lack_of_fit,
      'held_out': held_out,
      'by_least_squares': {
        family: {name: each[name] for name in ('alpha', 'beta')}
        for family, each in analysis.by_squares.items()
      },
      'crossings_by_least_squares': analysis.crossings_by_squares,
      'left_out_exponents': {
        family: {
          name: dict(
            zip(
              left.runs, left.constants[:, left.names.index(name)].tolist(),
              strict=True,
            )
          )
          for name in ('alpha', 'beta')
        }
        for family, left in analysis.left_out.items()
      },
      'readings_at_the_largest_run': analysis.readings,
      'ternary_against_float': {
        'tokens': analysis.common_tokens, **analysis.compared
      },
      'plans': [
        {'for': words, 'budget': budget}
        | (
          {'refused': choices}
          if isinstance(choices, str)
          else {'best_first': choices}
        )
        for words, budget, choices in analysis.plans
      ],
    }
  )  # fmt: skip


def _in_units(name: str) -> str:
  """A constant's name with its unit: alpha[ternary] keeps its family."""
  constant, bracket, family = name.partition('[')
  return _UNITS[constant] + bracket + family


def _plain(value: Any) -> Any:
  """As JSON has it: dataclasses as objects, nothing that is no number."""
  if dataclasses.is_dataclass(value):
    return {
      field.name: _plain(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
  if isinstance(value, dict):
    return {key: _plain(each) for key, each in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(each) for each in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _digest(runs: Sequence[runs_lib.Run]) -> str:
  """Of the rows, whatever their order and files."""
  lines = sorted(
    json.dumps(json.loads(runs_lib.line(run)), sort_keys=True) for run in runs
  )
  return hashlib.sha256('\n'.join(lines).encode()).hexdigest()
