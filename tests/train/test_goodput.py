# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tritera_jax.train import goodput


@pytest.fixture
def clock(monkeypatch):
  """Moves both clocks on."""
  now = [1000.0]
  monkeypatch.setattr(goodput.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(goodput.time, 'time', lambda: now[0])

  def pass_(seconds):
    now[0] += seconds

  return pass_


def test_each_second_belongs_to_one_phase(clock, tmp_path):
  ledger = goodput.Ledger(stall_seconds=50.0)
  clock(1)
  ledger.enter('data')
  clock(2)
  ledger.enter('step')
  clock(4)
  with ledger.phase('evaluate'):
    clock(8)
    with ledger.phase('save'):
      clock(16)
    clock(32)
  assert ledger.now == ('step', 1063.0)
  clock(64)  # that is no step any more
  ledger.write(tmp_path)
  want = {
    'start': 1, 'data': 2, 'step': 4, 'evaluate': 40, 'save': 16, 'stall': 64,
  }  # fmt: skip
  assert ledger.seconds == want
  assert goodput.measured(tmp_path).total == sum(want.values())


def record(started, time, at, /, **seconds):
  seconds = {name: float(value) for name, value in seconds.items()}
  return {
    'started': float(started), 'time': float(time), 'step': at,
    'seconds': seconds,
  }  # fmt: skip


def test_steps_trained_again_and_time_between_attempts_are_lost(tmp_path):
  records = [
    record(0, 10, 0, start=10),
    record(0, 30, 4, start=10, step=20),
    record(0, 70, 8, start=10, step=50, save=10),
    # Down for 30 s; back to step 6: half of the 30 s of steps 5 to 8 are lost.
    record(100, 105, 6, start=5),
    record(100, 125, 10, start=5, step=20),
  ]
  file = tmp_path / 'goodput.jsonl'
  file.write_text(''.join(json.dumps(r) + '\n' for r in records) + '{"cut')
  found = goodput.measured(tmp_path)
  assert found.seconds == {
    'step': 55, 'lost': 15, 'down': 30, 'start': 15, 'save': 10,
  }  # fmt: skip
  assert (found.attempts, found.lost_steps, found.total) == (2, 2, 125)
  assert found.share == pytest.approx(55 / 125)
  assert str(found).startswith('goodput 44.0% of 125 s, 2 attempt(s), 2 steps')


def test_no_record_and_a_damaged_one_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='has no goodput.jsonl'):
    goodput.measured(tmp_path)
  (tmp_path / 'goodput.jsonl').write_text('{"started": 1}\n')
  with pytest.raises(ValueError, match='goodput.jsonl is damaged'):
    goodput.measured(tmp_path)
