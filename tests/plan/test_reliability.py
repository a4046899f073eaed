# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tritera_jax.plan import reliability
from tritera_jax.plan.reliability import Assumptions


def test_llama_3_failed_each_three_hours():
  # arXiv 2407.21783: 419 unexpected interruptions in 54 days on 16,384 GPUs.
  found = reliability.saving(Assumptions(), 16_384, 1e9, 10.0)
  assert found.failures == pytest.approx(54 * 86_400 / 419, rel=0.02)


def test_the_interval_loses_least_in_a_simulation():
  """Failures at random; work since the last save is lost, and the way back."""
  assumed = Assumptions(
    failure_hours=100.0, blocking_seconds=9.0, blocking_rate=1e9,
    restart_seconds=300.0,
  )  # fmt: skip
  found = reliability.saving(assumed, 10, 1e9, 1.0)
  assert found.cost == 10 and found.failures == 36_000
  rng = np.random.default_rng(0)
  gaps = rng.exponential(found.failures, 20_000)

  def productive(interval):
    done = np.floor(gaps / (interval + found.cost)) * interval
    return done.sum() / (gaps + assumed.restart_seconds).sum()

  best = productive(found.interval)
  assert best > productive(found.interval / 3)
  assert best > productive(found.interval * 3)
  assert best == pytest.approx(found.goodput, abs=0.002)


def test_saves_are_at_least_a_step_apart_and_goodput_is_no_less_than_none():
  found = reliability.saving(Assumptions(failure_hours=1.0), 10_000, 1e12, 50.0)
  assert found.interval >= 50 and found.goodput == 0.0


def test_a_wrong_assumption_is_named():
  with pytest.raises(ValueError, match='failure-hours 0.0 must be > 0'):
    Assumptions(failure_hours=0.0)
