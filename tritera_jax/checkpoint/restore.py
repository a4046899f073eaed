# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints back, strictly, onto any mesh."""

from pathlib import Path

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from tritera_jax.checkpoint import save
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
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


def restore(
  checkpoints: ocp.CheckpointManager, step: int, **targets: PyTree
) -> dict[str, PyTree]:
  """Restores the items named, each onto its abstract target.

  Args:
    checkpoints: of `save.manager`.
    step: one of its committed steps.
    **targets: item name (params, rest) to a tree of ShapeDtypeStructs, each
      with the sharding to restore to.

  Raises:
    ValueError: an item is incomplete, or one of its leaves is missing, extra
      or of another shape or dtype than its target: all are named.
  """
  metadata = checkpoints.item_metadata(step)
  for item, target in targets.items():
    where = f'{checkpoints.directory}/{step}/{item}'
    if metadata[item] is None:
      raise ValueError(f'{where} is missing or incomplete')
    _check_leaves(metadata[item], target, where)
  restored = checkpoints.restore(
    step,
    args=ocp.args.Composite(
      **{k: ocp.args.StandardRestore(v) for k, v in targets.items()}
    ),
  )
  return {item: restored[item] for item in targets}


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
  folder = Path(folder)
  experiment = save.read_experiment(folder)
  with save.manager(folder) as checkpoints:
    steps = checkpoints.all_steps()
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
      raise FileNotFoundError(
        f'{folder} has no checkpoint{f" of step {step}" if step else ""}; '
        f'it has {sorted(steps) or "none"}'
      )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=device
      ),
      decoder.abstract_params(experiment.model),
    )
    params = restore(checkpoints, wanted, params=target)['params']
  return experiment, params
