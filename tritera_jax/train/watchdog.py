# SPDX-License-Identifier: Apache-2.0
"""A thread that ends a process which does not get on, and says what it awaits.

A lost host leaves the others in a collective that never ends; a dead file
system leaves a thread in a read. Nothing inside can be relied on to raise then,
so the process exits, and a scheduler starts the same command again.
"""

from collections.abc import Callable, Iterator
import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import TextIO

import jax

from tritera_jax.train.goodput import Ledger
from tritera_jax.train.signals import Signals

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_SLOW_DATA = 10.0  # seconds of waiting for one batch that are worth a word

Waiting = Callable[[], list[tuple[str, float]]]


class Watchdog(threading.Thread):
  """See `watching`."""

  def __init__(
    self,
    ledger: Ledger,
    signals: Signals,
    waiting: Waiting,
    *,
    stall_seconds: float,
    stop_seconds: float,
    file: TextIO | None = None,
    leave: Callable[[int], object] = os._exit,
  ):
    super().__init__(name='watchdog', daemon=True)
    self.ledger, self.signals, self.waiting = ledger, signals, waiting
    self.stall_seconds, self.stop_seconds = stall_seconds, stop_seconds
    # pytest's and notebooks' sys.stderr have no descriptor, which stacks need.
    self.file = file or sys.__stderr__ or sys.stderr
    self.leave = leave
    self.ended = threading.Event()
    self._told: tuple[str, float] | None = None  # the phase last spoken of

  def run(self):
    pause = min(1.0, self.stall_seconds / 8, (self.stop_seconds or 8) / 8)
    while not self.ended.wait(pause):
      self.look()

  def look(self):
    """Speaks or exits, if it is time to."""
    phase, since = now = self.ledger.now
    seconds = time.monotonic() - since
    if seconds > self.stall_seconds:
      self._say(f'{self._stalled(phase, seconds)}: giving up', stacks=True)
      self.leave(EXIT_AGAIN)
    elif now != self._told:
      if seconds > self.stall_seconds / 2:
        self._told = now
        self._say(self._stalled(phase, seconds), stacks=True)
      elif phase == 'data' and seconds > _SLOW_DATA:
        self._told = now
        self._say(self._stalled(phase, seconds))
    asked = self.signals.stop_at
    if self.stop_seconds and asked is not None:
      seconds = time.monotonic() - asked
      if seconds > self.stop_seconds:
        self._say(
          f'told to stop {seconds:.0f} s ago, more than run.stop_seconds='
          f'{self.stop_seconds:g}, and still here (in {phase!r}): leaving; '
          'the same command goes on from the newest checkpoint'
        )
        self.leave(EXIT_AGAIN)

  def _stalled(self, phase: str, seconds: float) -> str:
    text = (
      f'process {jax.process_index()} has been in {phase!r} for '
      f'{seconds:.0f} s at step {self.ledger.step} (run.stall_seconds='
      f'{self.stall_seconds:g})'
    )
    if phase == 'data':
      reads = [f'{path} ({age:.0f} s)' for path, age in self.waiting()[:4]]
      text += f', reading {", ".join(reads) or "nothing"}'
    return text

  def _say(self, text: str, stacks: bool = False):
    print(f'tritera: {text}', file=self.file, flush=True)
    if stacks:
      faulthandler.dump_traceback(self.file, all_threads=True)


@contextlib.contextmanager
def watching(
  ledger: Ledger,
  signals: Signals,
  waiting: Waiting,
  *,
  stall_seconds: float,
  stop_seconds: float,
) -> Iterator[None]:
  """Watches over the block: what stalls is named, then ended with 75.

  Args:
    ledger: whose phases are to end.
    signals: when one to stop came.
    waiting: paths being read, and for how many seconds.
    stall_seconds: as in `RunConfig`.
    stop_seconds: as in `RunConfig`.
  """
  watchdog = Watchdog(
    ledger,
    signals,
    waiting,
    stall_seconds=stall_seconds,
    stop_seconds=stop_seconds,
  )
  watchdog.start()
  try:
    yield
  finally:
    watchdog.ended.set()
    watchdog.join()
