# SPDX-License-Identifier: Apache-2.0
"""Run folders and their Orbax checkpoints: writing.

A run folder holds `experiment.json`, written before anything else, and
`checkpoints/<step>/{params,rest}`, where `rest` is what else training needs
to go on. Parameters are an item of their own so that they can be restored
alone. Only this module and `restore` name Orbax.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
import subprocess

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from tritera_jax import experiment as experiment_lib
from tritera_jax.experiment import Experiment

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def manager(folder: Path, keep: int | None = None) -> ocp.CheckpointManager:
  """Orbax's manager of a run folder; saves are asynchronous."""
  return ocp.CheckpointManager(
    (folder / 'checkpoints').resolve(),
    options=ocp.CheckpointManagerOptions(
      max_to_keep=keep, enable_async_checkpointing=True
    ),
    item_handlers={
      item: ocp.StandardCheckpointHandler() for item in ('params', 'rest')
    },
  )


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  *,
  params: PyTree,
  rest: PyTree,
):
  """Starts saving under `step`; returns once the arrays are copied out."""
  checkpoints.save(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(params), rest=ocp.args.StandardSave(rest)
    ),
  )


def write_experiment(experiment: Experiment, folder: Path):
  """Writes experiment.json, or checks the one that is there.

  Raises:
    ValueError: the folder belongs to another experiment; every differing
      field is named.
  """
  file = folder / 'experiment.json'
  if file.exists():
    _check_same(read_experiment(folder), experiment, folder)
    return
  folder.mkdir(parents=True, exist_ok=True)
  text = experiment_lib.to_json(experiment)
  record = {
    'experiment': json.loads(text),
    'digest': hashlib.sha256(text.encode()).hexdigest(),
    'commit': _git_commit(),
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }
  partial = file.with_suffix('.partial')
  partial.write_text(json.dumps(record, indent=2) + '\n')
  partial.rename(file)


def read_experiment(folder: str | Path) -> Experiment:
  """The experiment of a run folder.

  Raises:
    FileNotFoundError: not a run folder.
    ValueError: its experiment.json is malformed.
  """
  file = Path(folder) / 'experiment.json'
  if not file.is_file():
    raise FileNotFoundError(
      f'{folder} is not a run folder: it has no experiment.json'
    )
  try:
    record = json.loads(file.read_text())['experiment']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{file} is not an experiment record: {error!r}') from None
  return experiment_lib.from_json(json.dumps(record), str(file))


def _check_same(old: Experiment, new: Experiment, folder: Path):
  def flat(experiment):
    tree = json.loads(experiment_lib.to_json(experiment))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {'.'.join(key.key for key in path): leaf for path, leaf in leaves}

  # How often to look or save, and on which devices, changes no result.
  free = ('mesh.', 'run.folder', 'run.keep', 'run.log_every', 'data.path',
          'run.telemetry_every', 'run.save_every', 'run.evaluate_every',
          'run.evaluate_tokens')  # fmt: skip
  old_fields, new_fields = flat(old), flat(new)
  differing = [
    f'{name}: {old_fields.get(name)!r} there, {new_fields.get(name)!r} here'
    for name in sorted({*old_fields, *new_fields})
    if old_fields.get(name) != new_fields.get(name)
    and not name.startswith(free)
  ]
  if differing:
    raise ValueError(
      f'{folder} holds a run of another experiment ({"; ".join(differing)}); '
      'choose another --run.folder, or delete this one'
    )


def _git_commit() -> str | None:
  """The commit of the code, with '+' if the tree was changed; None if none."""
  here = Path(__file__).parent

  def git(*arguments):
    return subprocess.run(
      ['git', '-C', here, *arguments],
      capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None
