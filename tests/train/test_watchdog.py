# SPDX-License-Identifier: Apache-2.0
import time

import pytest

from tritera_jax.train.goodput import Ledger
from tritera_jax.train.signals import Signals
from tritera_jax.train.watchdog import Watchdog


@pytest.fixture
def watch(tmp_path):
  """What a watchdog says and does of a phase that has lasted so long."""
  with (tmp_path / 'said').open('w+') as file:
    ledger, signals, left = Ledger(), Signals(), []
    watchdog = Watchdog(
      ledger,
      signals,
      lambda: [('gs://b/train/00012', 31.4), ('gs://b/train/00013', 2.0)],
      stall_seconds=100.0,
      stop_seconds=20.0,
      file=file,
      leave=left.append,
    )
    ledger.step = 7

    def look(phase: str, seconds: float, told_to_stop: float | None = None):
      ledger.now = (phase, time.monotonic() - seconds)
      if told_to_stop is not None:
        signals.stop_at = time.monotonic() - told_to_stop
      file.seek(0)
      file.truncate()
      watchdog.look()
      watchdog.look()  # of one phase it speaks once
      file.seek(0)
      return file.read(), left.copy()

    yield look


def test_what_gets_on_is_left_alone(watch):
  assert watch('step', 49) == ('', [])
  assert watch('data', 9) == ('', [])


def test_a_slow_source_is_named(watch):
  said, left = watch('data', 12)
  assert said == (
    "tritera: process 0 has been in 'data' for 12 s at step 7 "
    '(run.stall_seconds=100), reading gs://b/train/00012 (31 s), '
    'gs://b/train/00013 (2 s)\n'
  )
  assert not left


def test_at_half_of_the_limit_every_stack_is_printed(watch):
  said, left = watch('save', 51)
  assert said.startswith("tritera: process 0 has been in 'save' for 51 s")
  assert said.count('most recent call first') >= 1 and __file__ in said
  assert said.count('tritera:') == 1
  assert not left


def test_at_the_limit_the_process_ends_with_75(watch):
  said, left = watch('step', 101)
  assert 'giving up' in said and set(left) == {75}


def test_a_stop_that_takes_too_long_ends_it_too(watch):
  assert watch('save', 3, told_to_stop=19) == ('', [])
  said, left = watch('save', 4, told_to_stop=21)
  assert 'told to stop 21 s ago, more than run.stop_seconds=20' in said
  assert set(left) == {75}
