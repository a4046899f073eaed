# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints back, strictly, onto any mesh."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import gc
import itertools
import json
from pathlib import Path
import sys
import time
from typing import Any

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from tritera_jax.checkpoint import save
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.parallel import processes


class DamagedError(ValueError):
  """A checkpoint cannot be read, or holds other bits than were saved."""


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
  try:
    metadata = checkpoints.item_metadata(step)
  except Exception as error:  # Orbax parses JSON as it finds it
    raise DamagedError(f'{where} cannot be read ({error!r})') from error
  missing = [item for item in targets if metadata.get(item) is None]
  if missing:
    raise DamagedError(f'{where}/{missing[0]} is missing')
  there = _restored(checkpoints, step, model=ocp.args.JsonRestore())['model']
  here = json.loads(json.dumps(dataclasses.asdict(model)))
  # A field that came later had its default.
  there = {
    field.name: field.default
    for field in dataclasses.fields(model)
    if field.default is not dataclasses.MISSING
  } | there
  differing = save.differences(there, here, 'model.')
  if differing:
    raise ValueError(f'{where} is of another model: {"; ".join(differing)}')
  for item, target in targets.items():
    _check_leaves(metadata[item], target, f'{where}/{item}')
  arguments = {k: ocp.args.StandardRestore(v) for k, v in targets.items()}
  restored = _restored(checkpoints, step, **arguments)
  return {item: restored[item] for item in targets}


def _restored(checkpoints: save.Manager, step: int, **items) -> Any:
  try:
    return checkpoints.restore(step, args=ocp.args.Composite(**items))
  except Exception as error:  # Orbax raises just that of arrays
    words = str(error).partition('See full TensorStore details')[0].strip()
    words = f'{type(error).__name__}: {words[:300]}'
  # Not from the handler: what was being read of other arrays hangs on the
  # exception, in a loop that is closed, and would say so one by one when it is
  # collected.
  hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    gc.collect()
  finally:
    sys.unraisablehook = hook
  raise DamagedError(
    f'{checkpoints.directory}/{step}/{"|".join(items)} cannot be read ({words})'
  )


def restore_state(
  checkpoints: save.Manager,
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
    DamagedError: it cannot be read, or is not what was saved.
  """
  state, digests = _read(checkpoints, step, model, target)
  _check_digests(checkpoints, step, state, digests)
  return state


def _read(checkpoints, step: int, model: ModelConfig, target: Any):
  """The state, and the digests that were saved with it."""
  restored = _restore(checkpoints, step, model, save.items(target))
  there = _restored(checkpoints, step, digests=ocp.args.JsonRestore())
  state = target._replace(params=restored['params'], **restored['rest'])
  return state, there['digests']


def _check_digests(checkpoints, step: int, state: Any, digests: dict):
  """All processes must call it: each array is hashed where it lies."""
  for item, tree in save.items(state).items():
    _check_digest(checkpoints, step, item, tree, digests)


def _check_digest(checkpoints, step: int, item: str, tree: Any, digests: dict):
  found = f'{int(save.digest(tree)):08x}'
  if digests.get(item) != found:
    raise DamagedError(
      f'{checkpoints.directory}/{step}/{item} has the digest {found}, not '
      f'{digests.get(item)} as when it was saved'
    )


def restore_newest(
  folder: Path,
  model: ModelConfig,
  target: Any,
  say: Callable[[str], object],
) -> Any | None:
  """The newest state that can be read; None if nothing was saved yet.

  Checkpoints that are newer but damaged are moved aside, to STEP.damaged, so
  that the run can go on from the one before. All processes must call it.

  Args:
    folder: the run's.
    model: as of `restore_state`.
    target: as of `restore_state`.
    say: takes words on damaged checkpoints.

  Raises:
    ValueError: see `restore_state`.
    DamagedError: there are checkpoints, and none can be read; none is moved.
  """
  place = folder / 'checkpoints'
  if not processes.from_first(lambda: b'yes' * place.is_dir()):
    return None
  _await(place)
  damaged: list[int] = []
  words: list[str] = []
  state = None
  with save.manager(folder, alone=True) as checkpoints:
    for step in _steps_together(checkpoints):
      error = None
      _await(place / str(step))
      try:
        state, digests = _read(checkpoints, step, model, target)
      except DamagedError as found:
        error = found
      if not processes.anywhere(error is not None):
        try:
          _check_digests(checkpoints, step, state, digests)
          break
        except DamagedError as found:
          error = found
      state = None
      damaged.append(step)
      words.append(str(error or 'another process cannot read it'))
  if not damaged:
    return state
  if state is None:
    raise DamagedError(
      f'no checkpoint of {folder} can be read: {"; ".join(words)}'
    )

  def move():
    for step in damaged:
      there = place / str(step)
      there.rename(_free(there.with_name(f'{step}.damaged')))

  processes.first_alone(move)
  say(
    f'{"; ".join(words)}; moved to {folder}/checkpoints/STEP.damaged, going on '
    f'from the one before, of step {step}'
  )
  return state


def _steps_together(checkpoints: save.Manager) -> list[int]:
  """As process 0 sees them, newest first: listings may be old elsewhere."""
  steps = processes.from_first(
    lambda: json.dumps(sorted(checkpoints.all_steps(), reverse=True)).encode()
  )
  return json.loads(steps)


def _await(path: Path):
  """Gives a shared file system a minute to show what is there."""
  end = time.monotonic() + 60
  while not path.exists() and time.monotonic() < end:
    time.sleep(1)


def _free(path: Path) -> Path:
  """`path`, or with a number, so that nothing is written over."""
  numbered = (path.with_name(f'{path.name}{n}') for n in itertools.count(2))
  return next(p for p in itertools.chain([path], numbered) if not p.exists())


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
    DamagedError: it cannot be read, or is not what was saved.
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
    digests = _restored(checkpoints, wanted, digests=ocp.args.JsonRestore())
    _check_digest(checkpoints, wanted, 'params', params, digests['digests'])
  return experiment, params


def restore_start(folder: str | Path, target: PyTree) -> Params:
  """The newest parameters of a run, onto the shardings of `target`.

  All processes must call it. Whether they mean the same to another model is
  for the caller to say.

  Raises:
    FileNotFoundError: not a run folder, or it has no checkpoint.
    ValueError: a leaf is missing, extra or of another shape or dtype than its
      target: all are named.
    DamagedError: it cannot be read, or is not what was saved.
  """
  model = save.read_experiment(folder).model
  with committed(folder) as (checkpoints, step):
    params = _restore(checkpoints, step, model, {'params': target})['params']
    digests = _restored(checkpoints, step, digests=ocp.args.JsonRestore())
    _check_digest(checkpoints, step, 'params', params, digests['digests'])
  return params


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
  with save.manager(Path(folder), alone=True) as checkpoints:
    steps = checkpoints.all_steps()
    wanted = max(steps, default=-1) if step is None else step
    if wanted not in steps:
      raise FileNotFoundError(
        f'{folder} has no checkpoint'
        f'{"" if step is None else f" of step {step}"}; it has '
        f'{sorted(steps) or "none"}'
      )
    yield checkpoints, wanted
