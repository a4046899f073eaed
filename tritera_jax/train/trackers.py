# SPDX-License-Identifier: Apache-2.0
"""Where else metrics go: TensorBoard, Weights & Biases."""

import hashlib
import importlib
import os
from pathlib import Path
import warnings

from tensorboardX import SummaryWriter


class TensorBoard:
  """Scalars in FOLDER/tensorboard: `tensorboard --logdir FOLDER`."""

  def __init__(self, folder: Path, from_step: int):
    """Hides what a resumed run will write again."""
    self._writer = SummaryWriter(
      str(folder / 'tensorboard'), purge_step=from_step + 1
    )

  def write(self, step: int, scalars: dict[str, float]):
    for name, value in scalars.items():
      self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


class WandB:
  """A run of Weights & Biases, one for a run folder however often resumed.

  Without an API key, or when its server cannot be reached, it is kept in the
  run folder (offline), to be sent with `wandb sync`: it never stops training.
  """

  def __init__(self, folder: Path, project: str, experiment: dict):
    try:
      wandb = importlib.import_module('wandb')
    except ModuleNotFoundError:
      raise ValueError(
        f'run.wandb={project!r} needs wandb: pip install wandb'
      ) from None
    # The place tells runs of one experiment apart.
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    arguments = {
      'project': project, 'id': name, 'name': folder.name, 'resume': 'allow',
      'dir': str(folder), 'config': experiment,
    }  # fmt: skip
    mode = os.environ.get('WANDB_MODE')
    if mode is None and not (os.environ.get('WANDB_API_KEY') or _netrc()):
      mode = 'offline'  # it would ask for a key
    try:
      self._run = wandb.init(mode=mode, **arguments)
    except (wandb.Error, OSError) as error:
      warnings.warn(f'wandb goes on offline: {error}', stacklevel=2)
      self._run = wandb.init(mode='offline', **arguments)

  def write(self, step: int, scalars: dict[str, float]):
    self._run.log(scalars, step=step)

  def close(self):
    self._run.finish()


def _netrc() -> bool:
  file = Path('~/.netrc').expanduser()
  return file.is_file() and 'api.wandb.ai' in file.read_text()


type Tracker = TensorBoard | WandB


def flat(record: dict, prefix: str = '') -> dict[str, float]:
  """Numbers of a record by path: {'a': {'b': 1}} gives {'a/b': 1}."""
  scalars = {}
  for name, value in record.items():
    if isinstance(value, dict):
      scalars |= flat(value, f'{prefix}{name}/')
    elif name != 'step' and isinstance(value, float | int):
      scalars[prefix + name] = float(value)
  return scalars


def open_trackers(
  folder: Path, from_step: int, *, tensorboard: bool, wandb: str,
  experiment: dict,
) -> list[Tracker]:  # fmt: skip
  """Those that are asked for; with the experiment's fields for display."""
  trackers: list[Tracker] = []
  if tensorboard:
    trackers.append(TensorBoard(folder, from_step))
  if wandb:
    trackers.append(WandB(folder, wandb, experiment))
  return trackers
