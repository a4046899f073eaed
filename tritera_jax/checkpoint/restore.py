# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints back, strictly, onto any mesh."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from tritera_jax.checkpoint import save
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params


def _check_leaves(found: PyTree, wanted: PyTree, where: str):
  """Orbax pads, cuts and skips leaves that disagree; here they are refused."""
  found = ocp.tree.to_flat_dict(found, sep='.')
  wanted = ocp.tree.to_flat_dict(wanted, sep='.')
  problems = [f'{name} is missing' for name in wanted.keys() - found.keys()]
  problems += [f'{name} is extra' for name in found.keys() - wanted.keys()]
  for name in wanted.keys() & found.keys():
    there, here = found[name], wanted[name]
    if (tuple(there.shape), there.dtype) != (here.shape, here.dtype):
      problems.append(
        f'{name} is {there.dtype}{list(there.shape)}, the model takes '
        f'{here.dtype}{list(here.shape)}'
      )
  if problems:
    raise ValueError(
      f'{where} does not fit this experiment: {"; ".join(sorted(problems))}'
    )


def _restore(
  checkpoints: ocp.CheckpointManager,
  step: int,
  model: ModelConfig,
  targets: dict[str, PyTree],
) -> dict[str, PyTree]:
  """Restores the items named, each onto its abstract target."""
  where = f'{checkpoints.directory}/{step}'
  metadata = checkpoints.item_metadata(step)
  missing = [item for item in targets if metadata.get(item) is None]
  try:
    there = checkpoints.restore(
      step, args=ocp.args.Composite(model=ocp.args.JsonRestore())
    )['model']
  except (OSError, ValueError, KeyError):
    missing.append('model')
  if missing:
    raise ValueError(
      f'{where}/{missing[0]} is missing or damaged; delete {where} to go on '
      'from the checkpoint before it'
    )
  here = json.loads(json.dumps(dataclasses.asdict(model)))
  differing = save.differences(there, here, 'model.')
  if differing:
    raise ValueError(f'{where} is of another model: {"; ".join(differing)}')
  for item, target in targets.items():
    _check_leaves(metadata[item], target, f'{where}/{item}')
  restored = checkpoints.restore(
    step,
    args=ocp.args.Composite(
      **{k: ocp.args.StandardRestore(v) for k, v in targets.items()}
    ),
  )
  return {item: restored[item] for item in targets}


def restore_state(
  checkpoints: ocp.CheckpointManager,
  step: int,
  model: ModelConfig,
  target: Any,
) -> Any:
  """The whole state of a run, onto the shardings of `target`.

  Args:
    checkpoints: of `save.manager`.
    step: one of its committed steps.
    model: what the caller takes the arrays for.
    target: the state as ShapeDtypeStructs, each with the sharding to restore
      to: any mesh will do.

  Raises:
    ValueError: the checkpoint is of another model, or a leaf is missing,
      extra or of another shape or dtype than its target: all are named.
  """
  restored = _restore(checkpoints, step, model, save.items(target))
  return target._replace(params=restored['params'], **restored['rest'])


def latest_step(folder: str | Path) -> int | None:
  """The newest committed step of a run folder; None if there is none."""
  if not (Path(folder) / 'checkpoints').is_dir():
    return None
  with save.manager(Path(folder)) as checkpoints:
    return checkpoints.latest_step()


def restore_params(
  folder: str | Path, step: int | None = None
) -> tuple[Experiment, Params]:
  """Experiment and float32 parameters of a run folder, on one device.

  Args:
    folder: the run's.
    step: default: the newest.

  Raises:
    FileNotFoundError: not a run folder, or it has no such checkpoint.
    ValueError: the checkpoint does not fit the run's experiment.
  """
  experiment = save.read_experiment(folder)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    decoder.abstract_params(experiment.model),
  )
  with committed(folder, step) as (checkpoints, wanted):
    params = _restore(
      checkpoints, wanted, experiment.model, {'params': target}
    )['params']
  return experiment, params


@contextlib.contextmanager
def committed(
  folder: str | Path, step: int | None = None
) -> Iterator[tuple[ocp.CheckpointManager, int]]:
  """The manager of a run's checkpoints and the step asked for, or the newest.

  A step that was not written to its end is none.

  Raises:
    FileNotFoundError: there is no such checkpoint.
  """
  if not (Path(folder) / 'checkpoints').is_dir():
    raise FileNotFoundError(f'{folder} has no checkpoint yet')
  with save.manager(Path(folder)) as checkpoints:
    steps = checkpoints.all_steps()
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
      raise FileNotFoundError(
        f'{folder} has no checkpoint'
        f'{"" if step is None else f" of step {step}"}; it has '
        f'{sorted(steps) or "none"}'
      )
    yield checkpoints, wanted
