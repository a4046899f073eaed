# SPDX-License-Identifier: Apache-2.0
"""A run's dynamics, from the files that `eval.interference` wrote.

A folder holds training.npz:

  family                          'ternary', 'binary' or 'float'
  steps int64 [S], losses float64 [S]            of training batches

and step_N.npz for checkpoints N = 1, 2, 4, ..., each with

  made_of                         what it was measured from, in words
  step int64                      N
  losses, losses_after float32 [N]     of held-out tokens at the checkpoint
      and after one more update
  predicted float32 [n]           sum_j g_ij dtheta_j of the first n of them
  gradient_sums, gradient_absolutes, update float32 [P]
                                  sum_i g_ij, sum_i |g_ij| and dtheta_j
"""

import dataclasses
import math
from pathlib import Path
from typing import Any
import zipfile

import numpy as np

from tritera_jax.scaling.dynamics import deceleration, interference
from tritera_jax.scaling.dynamics.deceleration import Curve, Deceleration
from tritera_jax.scaling.dynamics.interference import Interference, Projections

FAMILIES = 'ternary', 'binary', 'float'

# Kind of dtype, bytes an item (0: any), and how arrays share their lengths.
_TRAINING = {
  'family': ('U', 0, ''),
  'steps': ('i', 8, 'S'),
  'losses': ('f', 8, 'S'),
}
_STEP = {
  'made_of': ('U', 0, ''),
  'step': ('i', 8, ''),
  'losses': ('f', 4, 'N'),
  'losses_after': ('f', 4, 'N'),
  'predicted': ('f', 4, 'n'),
  'gradient_sums': ('f', 4, 'P'),
  'gradient_absolutes': ('f', 4, 'P'),
  'update': ('f', 4, 'P'),
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What was measured at a checkpoint.

  Attributes:
    step: updates made.
    held_out_loss: nats a token.
    one_step: of the losses, over the update that came next; None where that
      changed nothing, as with a learning rate of 0.
    doubling: of the losses, until twice the step; None if that is not there.
    gradient_D: mean of D_j over coordinates.
    histogram: coordinates by 1 - D_j, in hundredths.
    projections: of the tokens' gradients on that update.
    correlation: of its first-order prediction with what tokens gained by it.
  """

  step: int
  held_out_loss: float
  one_step: Interference | None
  doubling: Interference | None
  gradient_D: float
  histogram: tuple[int, ...]
  projections: Projections
  correlation: float


@dataclasses.dataclass(frozen=True)
class Dynamics:
  """A run's.

  Attributes:
    family: of its weights.
    steps: that were kept of its loss curve.
    losses: of these, smoothed.
    deceleration: None if there is none.
    no_deceleration: why, in words.
    checkpoints: by step.
  """

  family: str
  steps: tuple[int, ...]
  losses: tuple[float, ...]
  deceleration: Deceleration | None
  no_deceleration: str
  checkpoints: tuple[Checkpoint, ...]


def read(folder: str | Path, curve: Curve = Curve()) -> Dynamics:
  """What the files of a folder say.

  Args:
    folder: that `eval.interference.collect` wrote.
    curve: how the loss curve is fitted.

  Raises:
    FileNotFoundError: there are no such files.
    ValueError: one is damaged, or not what its name says; it is named.
  """
  folder = Path(folder)
  training = _arrays(folder / 'training.npz', _TRAINING)
  family = str(training['family'])
  if family not in FAMILIES:
    raise ValueError(
      f'{folder}/training.npz: family={family!r} is none of {FAMILIES}'
    )
  try:
    kept, means = deceleration.smoothed(
      training['steps'], training['losses'], curve
    )
  except ValueError as error:
    raise ValueError(f'{folder}/training.npz: {error}') from None
  law, why = None, ''
  try:
    law = deceleration.fit_smoothed(kept, means, curve)
  except deceleration.NoBreakError as error:
    why = str(error)
  return Dynamics(
    family,
    tuple(kept.tolist()),
    tuple(means.tolist()),
    law,
    why,
    _checkpoints(folder),
  )


def _checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
  places = {
    int(name): path
    for path in folder.glob('step_*.npz')
    if (name := path.stem.removeprefix('step_')).isdecimal()
  }
  found: list[Checkpoint] = []
  before: tuple[int, np.ndarray] | None = None
  for step in sorted(places):
    arrays = _arrays(places[step], _STEP)
    if arrays['step'] != step:
      raise ValueError(f'{places[step]} holds step {arrays["step"]}')
    losses = arrays['losses'].astype(np.float64)
    if before is not None and 2 * before[0] == step:
      if before[1].shape != losses.shape:
        raise ValueError(
          f'{places[step]} has losses of {len(losses)} tokens, that of step '
          f'{before[0]} of {len(before[1])}; measure both alike'
        )
      doubling = interference.interference(losses - before[1])
      found[-1] = dataclasses.replace(found[-1], doubling=doubling)
    found.append(_checkpoint(step, arrays))
    before = step, losses
  return tuple(found)


def _checkpoint(step: int, arrays: dict[str, np.ndarray]) -> Checkpoint:
  sums, absolutes = arrays['gradient_sums'], arrays['gradient_absolutes']
  predicted = arrays['predicted'].astype(np.float64)
  changes = arrays['losses_after'].astype(np.float64) - arrays['losses']
  moved = bool(arrays['update'].any())
  gradients = interference.gradient_interference(sums, absolutes)
  return Checkpoint(
    step,
    float(arrays['losses'].mean(dtype=np.float64)),
    interference.interference(changes) if moved else None,
    None,
    gradients.D,
    tuple(gradients.histogram.tolist()),
    interference.projections(sums, absolutes, arrays['update'], predicted),
    _correlation(predicted, changes[: len(predicted)]) if moved else math.nan,
  )


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
  x, y = x - x.mean(), y - y.mean()
  norm = math.sqrt((x @ x) * (y @ y))
  return float(x @ y) / norm if norm else math.nan


def _arrays(
  file: Path, wanted: dict[str, tuple[str, int, str]]
) -> dict[str, np.ndarray]:
  """The arrays of a file from outside, all checked before they are read."""
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is not there; `tritera dynamics RUN` measures and writes it'
    )
  try:
    with zipfile.ZipFile(file) as archive:
      _check_headers(archive, file, wanted)
    with np.load(file, allow_pickle=False) as found:
      arrays = {name: found[name] for name in wanted}
  except (zipfile.BadZipFile, EOFError, OSError) as error:
    raise ValueError(f'{file} is damaged: {error}') from None
  for name, array in arrays.items():
    if array.dtype.kind == 'f' and not np.isfinite(array).all():
      raise ValueError(f'{file}: {name} holds a number that is not finite')
  if 'predicted' in arrays and len(arrays['predicted']) > len(arrays['losses']):
    raise ValueError(f'{file}: predicted is longer than losses')
  return arrays


def _check_headers(
  archive: zipfile.ZipFile, file: Path, wanted: dict[str, Any]
):
  names = sorted(info.filename for info in archive.infolist())
  if names != sorted(f'{name}.npy' for name in wanted):
    raise ValueError(f'{file} holds {names}, not {sorted(wanted)}')
  lengths: dict[str, int] = {}
  for name, (kind, size, dimension) in wanted.items():
    info = archive.getinfo(f'{name}.npy')
    with archive.open(info) as member:
      try:
        np.lib.format.read_magic(member)  # 1.0, for it has no long header
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
      except ValueError as error:
        raise ValueError(f'{file}: {name}: {error}') from None
      bytes_there = info.file_size - member.tell()
    if (
      # No array is larger than its file: one that says so is never made.
      info.compress_type != zipfile.ZIP_STORED
      or info.file_size > file.stat().st_size
      or dtype.kind != kind
      or size not in (0, dtype.itemsize)
      or len(shape) != len(dimension)
      or math.prod(shape) * dtype.itemsize != bytes_there
      or (shape and lengths.setdefault(dimension, shape[0]) != shape[0])
      or 0 in shape
    ):
      raise ValueError(
        f'{file}: {name} is {dtype}{list(shape)} in {bytes_there} bytes, which '
        'is not what `tritera dynamics` writes'
      )
