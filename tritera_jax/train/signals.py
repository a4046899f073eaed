# SPDX-License-Identifier: Apache-2.0
"""What a running process is told from outside, between two steps."""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import signal
import threading
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int32
import numpy as np

from tritera_jax.train import step


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
    stop_at: when it came (time.monotonic), or None.
    profile: SIGUSR1 came.
  """

  stop: int | None = None
  stop_at: float | None = None
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
  handled = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
  # All of them first: a handler puts those of others back.
  before = {number: signal.getsignal(number) for number in handled}

  def stop(number, frame):
    del frame
    signals.stop, signals.stop_at = number, time.monotonic()
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
    signal.signal(number, handler)
  try:
    yield signals
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Wish(NamedTuple):
  """What is to be done after a step, by all processes or none.

  Attributes:
    stop: number of a signal, or 0.
    busy: a periodic checkpoint had better wait.
  """

  stop: int
  busy: bool


class Agreement:
  """Makes the wishes of each process those of all, at the same step.

  Two processes get a signal at different moments, and one that stops alone
  leaves the others in a collective. So wishes go into each update as votes and
  come back among its metrics, which are the same everywhere: no program of its
  own, which might run in another order than the updates, and no waiting.
  """

  def __init__(self, mesh: Mesh, signals: Signals):
    self.signals = signals
    self.alone = jax.process_count() == 1
    self.sharding = step.votes_sharding(mesh)
    self.shape = (mesh.size, len(Wish._fields))
    self.busy = False

  def votes(self, busy: bool) -> tuple[Int32[Array, 'P W'], ...]:
    """This process's, for `step.jitted`; nothing without other processes."""
    self.busy = busy
    if self.alone:
      return ()
    row_1W = np.array([[self.signals.stop or 0, busy]], np.int32)
    return (
      jax.make_array_from_callback(self.shape, self.sharding, lambda _: row_1W),
    )

  def reached(self, measured: Mapping | None) -> Wish:
    """What holds for all, by the metrics of the update before the last."""
    if self.alone:
      return Wish(self.signals.stop or 0, self.busy)
    if measured is None:
      return Wish(0, False)  # nothing can be being written yet
    stop, busy = np.asarray(measured['votes']).tolist()
    return Wish(stop, bool(busy))
