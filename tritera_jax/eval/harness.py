# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-eval, its own or local ones, and a record of what they gave."""

from collections.abc import Sequence
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import safetensors

from tritera_jax.checkpoint import pack, restore, save
from tritera_jax.generate import load
from tritera_jax.model import flops
from tritera_kernels.fused import CacheType
from tritera_kernels.matmul import Activations

# What TriLM and FloatLM were scored on, without examples (Spectra, section 4;
# lm-eval 0.4.2 there). The names are those of lm-eval 0.4.13.
PAPER = (
  'arc_easy', 'arc_challenge', 'hellaswag', 'boolq', 'piqa', 'winogrande',
  'lambada_openai', 'sciq', 'logiqa', 'mmlu_continuation', 'triviaqa',
  'crows_pairs_english', 'truthfulqa_mc1',
)  # fmt: skip
PRESETS = {'paper': PAPER}

_PACKAGES = ('tritera_jax', 'jax', 'lm_eval', 'datasets', 'tokenizers')


def evaluate(
  path: str | Path,
  tasks: Sequence[str],
  *,
  include: str | Path | None = None,
  limit: int | None = None,
  shots: int | None = None,
  batch_size: int = 16,
  activations: Activations | None = None,
  cache: CacheType | None = None,
  seed: int = 0,
  samples: bool = False,
  command: str = '',
) -> dict[str, Any]:
  """Runs tasks on a run or a packed model.

  Args:
    path: run folder or packed folder.
    tasks: names, of lm-eval's or of `include`'s tasks, groups and tags, or
      'paper'. Data sets of lm-eval's tasks come from the Hugging Face hub.
    include: folder with YAML files of tasks. If all names are there, nothing
      else is looked for.
    limit: items a task; default: all.
    shots: examples before each item; default: what a task says, or none.
    batch_size: rows at once.
    activations: of a packed model: 'float', 'bfloat16' or 'int8'; default: its
      record's.
    cache: of a packed model, what keys and values are rounded to; default:
      'bfloat16'. 'float32' scores as the latents do.
    seed: of sampling, and of examples.
    samples: keep every item, its requests and what the model answered.
    command: what was typed, for the record.

  Returns:
    What may be written as JSON: the command, the model, the packages'
    versions, and lm-eval's own results.

  Raises:
    FileNotFoundError: no such run, packed model or folder.
    ValueError: an unknown task, a name twice, or lm-eval is not installed.
  """
  names = _names(tasks)
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit} must be >= 1')
  if include is not None and not Path(include).is_dir():
    raise FileNotFoundError(f'include={include} is not a folder')
  if importlib.util.find_spec('lm_eval') is None:
    raise ValueError("tasks need lm_eval: pip install 'tritera_jax[eval]'")
  about = describe(path, activations, cache)
  manager = _manager(names, include)
  loaded = load.load(path, activations=activations, cache=cache)
  adapter = importlib.import_module('tritera_jax.eval.adapter')
  model = adapter.TriteraLM(
    loaded,
    batch_size=batch_size,
    seed=seed,
    details={
      'model_num_parameters': flops.parameters(loaded.model.config),
      'model_sha': about['fingerprint'],
    },
  )
  evaluator = importlib.import_module('lm_eval.evaluator')
  results = evaluator.simple_evaluate(
    model,
    tasks=list(names),
    num_fewshot=shots,
    limit=limit,
    batch_size=batch_size,
    task_manager=manager,
    random_seed=seed,
    numpy_random_seed=seed,
    fewshot_random_seed=seed,
    log_samples=samples,
  )
  return {
    'command': command,
    'tasks': list(tasks),
    'model': about,
    'commit': save.git_commit(),
    'packages': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'lm_eval': _plain(results),
  }


def describe(
  path: str | Path,
  activations: Activations | None = None,
  cache: CacheType | None = None,
) -> dict[str, Any]:
  """What was scored: where it lies, its fingerprint, how it was run.

  The fingerprint is that of codes and scales; None for a FloatLM, which has
  none.

  Raises:
    FileNotFoundError: neither kind of folder.
    ValueError: see `restore.restore_params`.
  """
  path = Path(path)
  file = path / 'model.safetensors'
  if file.exists():
    with safetensors.safe_open(file, framework='np') as opened:
      stated = opened.metadata()
    return {
      'path': str(path),
      'kind': 'packed',
      'format': stated['format'],
      'fingerprint': stated['fingerprint'],
      'activations': activations or stated['activations'],
      'cache': cache or 'bfloat16',
    }
  experiment, params = restore.restore_params(path)
  config = experiment.model
  return {
    'path': str(path),
    'kind': 'run',
    'family': config.family,
    'step': save.latest_step(path),
    'digest': json.loads((path / 'experiment.json').read_text())['digest'],
    'fingerprint': None
    if config.family == 'float'
    else pack.latent_fingerprint(config, params),
  }


def write(record: dict[str, Any], file: str | Path):
  """Writes what `evaluate` returned, as JSON."""
  file = Path(file)
  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_name(f'{file.name}.partial')
  partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + '\n')
  partial.rename(file)


def table(record: dict[str, Any]) -> str:
  """The scores, as lm-eval prints them."""
  utils = importlib.import_module('lm_eval.utils')
  found = record['lm_eval']
  parts = [utils.make_table(found)]
  if found.get('groups'):
    parts.append(utils.make_table(found, 'groups'))
  return '\n'.join(parts)


def _names(tasks: Sequence[str]) -> tuple[str, ...]:
  names = [one for name in tasks for one in PRESETS.get(name, (name,))]
  if not names:
    raise ValueError(f'no task; name some, or {" or ".join(PRESETS)}')
  twice = {name for name in names if names.count(name) > 1}
  if twice:
    raise ValueError(f'tasks has {", ".join(sorted(twice))} twice')
  return tuple(names)


def _manager(names: Sequence[str], include: str | Path | None):
  """lm-eval's index of tasks: its own are thousands of files to read."""
  tasks = importlib.import_module('lm_eval.tasks')
  folder = None if include is None else str(include)
  if folder is not None:
    manager = tasks.TaskManager(include_path=folder, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
      return manager
  manager = tasks.TaskManager(include_path=folder)
  for name in names:
    if name not in manager.all_tasks:
      near = difflib.get_close_matches(name, manager.all_tasks, n=3)
      hint = f'; did you mean {" or ".join(near)}?' if near else ''
      raise ValueError(f'no task {name!r} in lm_eval or {include}{hint}')
  return manager


def _plain(results: Any) -> dict[str, Any]:
  """What JSON can hold; functions of a task's YAML become their source."""
  utils = importlib.import_module('lm_eval.utils')
  return json.loads(json.dumps(results, default=utils.handle_non_serializable))
