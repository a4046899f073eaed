# SPDX-License-Identifier: Apache-2.0
"""Batches whose loss went wrong: known, gone back behind, and skipped.

A run trains on the batches of its dataset in order but for ranges that are
skipped (PaLM, section 5.1, went back about 100 steps and skipped 200 to 500
batches at each spike). `RUN/skipped.json` is their only record: it and the
number of updates say which batch is next.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import math
from pathlib import Path
import shutil
import time
from typing import Any

import grain
import pydantic

from tritera_jax import validated
from tritera_jax.checkpoint import save
from tritera_jax.data import loader
from tritera_jax.experiment import RecoveryConfig
from tritera_jax.parallel import processes
from tritera_jax.train import metrics

_FILE = 'skipped.json'


@dataclasses.dataclass(frozen=True)
class Skipped:
  """Batches first..stop-1, which are never trained on.

  Attributes:
    why: in words.
    date: when that was decided, ISO 8601.
    rolled_back: by the run itself, not by its user.
  """

  first: int
  stop: int
  why: str
  date: str
  rolled_back: bool = False


class BadBatch(Exception):
  """Update `step` (counted from 1), of batch `batch`, went wrong.

  Attributes:
    why: in words.
    state: to be saved if the run stops; None if an update made it worse.
  """

  def __init__(self, step: int, batch: int, why: str, state: Any = None):
    super().__init__(f'{why} at step {step}')
    self.step, self.batch, self.why, self.state = step, batch, why, state


class Judge:
  """Tells a wrong loss from the others."""

  def __init__(self, config: RecoveryConfig, folder: Path, start: int):
    """Knows the losses that were recorded before update `start`."""
    self.config = config
    losses = [r['loss'] for r in metrics.read(folder) if r['step'] <= start]
    self.losses = collections.deque(losses, config.window)
    self.judged = start

  def why(self, measured, step: int) -> str | None:
    """What is wrong with the metrics of a step, in words, or None.

    Of a step that was judged before, None.
    """
    if step <= self.judged:
      return None
    self.judged = step
    loss = float(measured['loss'])
    if not measured['updated']:
      norm = float(measured['gradient_norm'])
      return f'loss is {loss} and gradient_norm {norm}'
    spike = self.config.spike
    if spike and len(self.losses) == self.config.window:
      mean = math.fsum(self.losses) / len(self.losses)
      if loss > mean + spike:
        return (
          f'loss is {loss:.3f}, more than run.recovery.spike={spike:g} above '
          f'the mean of the last {len(self.losses)}, {mean:.3f},'
        )
    self.losses.append(loss)
    return None


def read(folder: Path) -> list[Skipped]:
  """The batches that a run skips, as this process sees its folder.

  Raises:
    ValueError: its record is damaged.
  """
  return _parsed(folder / _FILE, _bytes(folder))


def read_together(folder: Path) -> list[Skipped]:
  """The same, as process 0 sees it: for what all must agree on."""
  return _parsed(folder / _FILE, processes.from_first(lambda: _bytes(folder)))


_SKIPPED = pydantic.TypeAdapter(list[Skipped])


def _bytes(folder: Path) -> bytes:
  file = folder / _FILE
  return file.read_bytes() if file.exists() else b'[]'


def _parsed(file: Path, text: bytes) -> list[Skipped]:
  return validated.from_json(_SKIPPED, text, f'{file} is damaged')


def _write(folder: Path, skipped: Iterable[Skipped]):
  text = json.dumps([dataclasses.asdict(one) for one in skipped], indent=2)
  partial = (folder / _FILE).with_suffix('.partial')
  partial.write_text(text + '\n')
  partial.rename(folder / _FILE)


def trained_below(folder: Path) -> int:
  """One past the last batch that the newest checkpoint is made from."""
  return _trained_below(save.latest_step(folder) or 0, read(folder))


def record_named(folder: Path, ranges: Sequence[tuple[int, int]], done: int):
  """Records the ranges that a user named and that are not recorded yet.

  Args:
    folder: the run's.
    ranges: first batch and one past the last of each.
    done: as of `trained_below`.

  Raises:
    ValueError: a range begins among the batches that were trained on.
  """
  skipped = read(folder)
  known = {(one.first, one.stop) for one in skipped}
  new = [named for named in ranges if tuple(named) not in known]
  if not new:
    return
  for first, stop in new:
    if first < done:
      raise ValueError(
        f'run.skip={first} {stop}: the newest checkpoint of {folder} is made '
        f'from the batches below {done}; name later ones, or move the '
        f'checkpoints past batch {first} out of {folder}/checkpoints first'
      )
  why = f'named by run.skip after batch {done}'
  _write(folder, skipped + [Skipped(*named, why, _now()) for named in new])


def _now() -> str:
  return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())


def _merged(skipped: Iterable[Skipped]) -> list[tuple[int, int]]:
  """The ranges in order, none touching another."""
  merged: list[tuple[int, int]] = []
  for one in sorted(skipped, key=lambda one: one.first):
    if merged and one.first <= merged[-1][1]:
      first, stop = merged.pop()
      merged.append((first, max(stop, one.stop)))
    else:
      merged.append((one.first, one.stop))
  return merged


def batch_of(step: int, skipped: Iterable[Skipped]) -> int:
  """The batch that update number `step`, counted from 0, is made from."""
  batch = step
  for first, stop in _merged(skipped):
    if batch >= first:
      batch += stop - first
  return batch


def _trained_below(step: int, skipped: Iterable[Skipped]) -> int:
  """One past the last batch that `step` updates were made from."""
  return 1 + batch_of(step - 1, skipped) if step else 0


def stream(
  batches: grain.MapDataset, step: int, skipped: Sequence[Skipped]
) -> Iterator[tuple[int, Any]]:
  """The number of each batch, and the batch, from update `step` (from 0) on."""
  first = batch_of(step, skipped)
  for stop, after in [*_merged(skipped), (None, first)]:
    if stop is not None and stop <= first:
      continue
    part = batches if stop is None else batches.slice(slice(0, stop))
    yield from enumerate(loader.iterate(part, first), first)
    first = after


def roll_back(
  folder: Path,
  checkpoints: save.Manager,
  config: RecoveryConfig,
  bad: BadBatch,
) -> str:
  """Skips the batches around a bad one; what was trained on them is put aside.

  Those checkpoints are STEP.rolled_back until the next time.

  All processes must call it.

  Returns:
    What was done, in words.

  Raises:
    FloatingPointError: the run was rolled back too often.
  """
  skipped = read_together(folder)
  times = sum(one.rolled_back for one in skipped)
  if times >= config.most:
    raise FloatingPointError(
      f'{bad}; the run was rolled back {times} times before, '
      f'run.recovery.most={config.most}: see {folder / _FILE}'
    )
  save.wait(checkpoints)
  first = max(0, bad.batch - config.before)
  steps = sorted(checkpoints.all_steps())
  early = [s for s in steps if _trained_below(s, skipped) <= first]
  # Rather fewer batches skipped than all the way back to the beginning.
  kept = max(early) if early else min(steps, default=0)
  one = Skipped(
    max(first, _trained_below(kept, skipped)),
    bad.batch + 1 + config.after,
    str(bad),
    _now(),
    rolled_back=True,
  )

  def put_aside():
    place = folder / 'checkpoints'
    for old in place.glob('*.rolled_back'):  # of the time before
      shutil.rmtree(old)
    for step in steps:
      if step > kept:
        (place / str(step)).rename(place / f'{step}.rolled_back')
    _write(folder, [*skipped, one])  # last: it says which batch a step is of

  processes.first_alone(put_aside)
  return (
    f'{bad}: back to {f"checkpoint {kept}" if kept else "the beginning"}; '
    f'batches {one.first}..{one.stop - 1} are skipped from now on'
  )
