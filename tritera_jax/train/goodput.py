# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes: goodput is the share that trained what stays.

Each attempt of a run (a process, or what follows a roll-back) has a ledger of
seconds by phase, whose state is appended to `goodput.jsonl`. Steps made again
because the attempt before ended past its last checkpoint were lost; between two
attempts the run was down.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
import time

import numpy as np

_FILE = 'goodput.jsonl'
TRAINING = 'step'


class Ledger:
  """Seconds of this process by phase; phases may lie in one another.

  The host's view: while it waits for the devices they train, so `step` is all
  that no other phase is. A phase longer than `stall_seconds` was a stall.

  Attributes:
    now: name of the phase, and when it began (time.monotonic): one tuple, so
      that another thread reads both at once.
    step: updates made, for those who look from outside.
  """

  def __init__(self, stall_seconds: float = float('inf')):
    self.stall_seconds = stall_seconds
    self.restart()

  def restart(self):
    """Begins another attempt."""
    self.started = time.time()
    self.now = ('start', time.monotonic())
    self.step = 0
    self.seconds: dict[str, float] = {}

  def enter(self, name: str):
    """Ends the phase that was and begins another, or the same anew."""
    before, since = self.now
    self.now = (name, time.monotonic())
    took = self.now[1] - since
    if took > self.stall_seconds:
      before = 'stall'
    self.seconds[before] = self.seconds.get(before, 0.0) + took

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    outside, _ = self.now
    self.enter(name)
    try:
      yield
    finally:
      self.enter(outside)

  def write(self, folder: Path):
    """Appends what there is to the run's file."""
    self.enter(self.now[0])
    record = {
      'started': self.started,
      'time': time.time(),
      'step': self.step,
      'seconds': {k: round(v, 3) for k, v in self.seconds.items()},
    }
    # A line end first: the line before may have been cut by a full disk.
    with (folder / _FILE).open('a') as file:
      file.write('\n' + json.dumps(record) + '\n')


@dataclasses.dataclass(frozen=True)
class Goodput:
  """What the attempts of a run did, in seconds.

  Attributes:
    total: from the first start to the last record.
    seconds: by phase, of all attempts; `step` without what was lost, beside
      `lost` (trained again later) and `down` (between attempts).
    attempts: how many.
    lost_steps: steps trained more than once.
  """

  total: float
  seconds: dict[str, float]
  attempts: int
  lost_steps: int

  @property
  def share(self) -> float:
    """Of the total, what trained steps that stayed."""
    return self.seconds[TRAINING] / self.total if self.total else 0.0

  def __str__(self) -> str:
    head = (
      f'goodput {self.share:.1%} of {self.total:,.0f} s, '
      f'{self.attempts} attempt(s), {self.lost_steps} steps lost'
    )
    width = max(map(len, self.seconds))
    return '\n'.join(
      [head]
      + [
        f'  {name:<{width}} {seconds:>12,.1f} s  {seconds / self.total:6.1%}'
        for name, seconds in sorted(
          self.seconds.items(), key=lambda item: -item[1]
        )
      ]
    )


def _records(text: str) -> Iterator[dict]:
  """Of the lines, but those that a crash or a full disk has cut."""
  for line in filter(None, text.split('\n')):
    try:
      yield json.loads(line)
    except ValueError:
      continue


def measured(folder: str | Path) -> Goodput:
  """The goodput of a run so far.

  Raises:
    FileNotFoundError: the run has no record of it.
    ValueError: the record is damaged.
  """
  path = Path(folder) / _FILE
  if not path.is_file():
    raise FileNotFoundError(f'{folder} has no {_FILE}: not a run, or not begun')
  try:
    records = list(_records(path.read_text()))
    attempts = [
      list(group)
      for _, group in itertools.groupby(records, lambda r: r['started'])
    ]
    seconds: dict[str, float] = {TRAINING: 0.0, 'lost': 0.0, 'down': 0.0}
    lost_steps = 0
    for attempt, after in itertools.zip_longest(attempts, attempts[1:]):
      last = attempt[-1]
      for name, value in last['seconds'].items():
        seconds[name] = seconds.get(name, 0.0) + value
      if after is None:
        continue
      seconds['down'] += max(0.0, after[0]['started'] - last['time'])
      lost_steps += max(0, last['step'] - after[0]['step'])
      trained = [record['seconds'].get(TRAINING, 0.0) for record in attempt]
      kept = np.interp(
        after[0]['step'], [record['step'] for record in attempt], trained
      )
      seconds['lost'] += trained[-1] - float(kept)
    seconds[TRAINING] -= seconds['lost']
    total = records[-1]['time'] - records[0]['started']
  except (ValueError, KeyError, TypeError, IndexError) as error:
    raise ValueError(f'{path} is damaged ({error!r}); delete it') from None
  return Goodput(total, seconds, len(attempts), lost_steps)
