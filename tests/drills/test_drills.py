# SPDX-License-Identifier: Apache-2.0
"""Short runs of the drills, so that they stay fit for the long ones."""

from tests.drills import (
  fuzz_headers,
  kill_prepare,
  kill_training,
  lose_processes,
  stop_bucket,
  trillion_tokens,
)


def test_preparing_survives_kills(tmp_path):
  said = kill_prepare.drill(kills=2, megabytes=3, seed=1, folder=tmp_path)
  assert said.startswith('2 kills')


def test_training_survives_kills_inside_a_save_too(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')  # one device
  said = kill_training.drill(
    kills=2, inside=1, steps=40, seed=1, folder=tmp_path
  )
  assert 'digests of leaves and records equal' in said


def test_processes_survive_what_is_done_to_them(tmp_path):
  [row] = lose_processes.drills(['storm'], steps=40, folder=tmp_path)
  assert row['result'].endswith('digests equal')
  assert row['exit codes'] == '[75, -9]; [143, 143]'


def test_a_trillion_tokens_are_entered_anywhere(tmp_path):
  said = trillion_tokens.drill(tmp_path, steps=2)
  assert said.startswith('1,200,000,000,000 tokens in 17,881 shards: opened')


def test_training_survives_a_bucket_that_stops(tmp_path):
  said = stop_bucket.drill(
    tmp_path, seconds=2, cases=stop_bucket.CASES[1:2], steps=60
  )
  assert said.endswith('60 losses and digests equal in each')


def test_damaged_headers_are_refused_or_read_right(tmp_path):
  said = fuzz_headers.drill(rounds=300, seed=7, folder=tmp_path)
  for line in said.splitlines():
    assert ': 300 damaged, ' in line
