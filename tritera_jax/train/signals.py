# SPDX-License-Identifier: Apache-2.0
"""What a running process is told from outside, between two steps."""

from collections.abc import Iterator
import contextlib
import dataclasses
import signal
import threading


class Stopped(Exception):
  """A signal ended the run after its state was saved.

  Attributes:
    number: of the signal; 128 + number is the exit code by convention.
  """

  def __init__(self, number: int, message: str):
    super().__init__(message)
    self.number = number


@dataclasses.dataclass
class Signals:
  """Signals that came and were not acted upon yet.

  Attributes:
    stop: SIGTERM or SIGINT (Ctrl-C), or None.
    profile: SIGUSR1 came.
  """

  stop: int | None = None
  profile: bool = False


@contextlib.contextmanager
def received() -> Iterator[Signals]:
  """Notes signals instead of dying of them; a second one to stop kills.

  In threads other than the main one nothing can be noted, and nothing is
  changed.
  """
  signals = Signals()
  if threading.current_thread() is not threading.main_thread():
    yield signals
    return
  before = {}

  def stop(number, frame):
    del frame
    signals.stop = number
    for one in (signal.SIGTERM, signal.SIGINT):
      signal.signal(one, before[one])

  def profile(number, frame):
    del number, frame
    signals.profile = True

  for number, handler in (
    (signal.SIGTERM, stop),
    (signal.SIGINT, stop),
    (signal.SIGUSR1, profile),
  ):
    before[number] = signal.signal(number, handler)
  try:
    yield signals
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
