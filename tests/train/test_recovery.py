# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax.checkpoint import save
from tritera_jax.data import loader, shards
from tritera_jax.experiment import RecoveryConfig
from tritera_jax.train import loop, metrics, recovery
from tritera_jax.train.recovery import Skipped


def ranges(*pairs) -> list[Skipped]:
  return [Skipped(first, stop, 'why', 'now') for first, stop in pairs]


def test_the_batches_of_a_run_are_those_that_are_not_skipped():
  rng = random.Random(0)
  for _ in range(50):
    pairs = [
      (first, first + rng.randint(1, 9))
      for first in rng.sample(range(60), rng.randint(0, 6))
    ]
    gone = {n for first, stop in pairs for n in range(first, stop)}
    left = [n for n in range(200) if n not in gone]
    got = [recovery.batch_of(step, ranges(*pairs)) for step in range(100)]
    assert got == left[:100], pairs


@pytest.mark.parametrize('step', [0, 3, 4, 9])
def test_the_stream_is_that_of_the_batches_left(tiny_data, step):
  source = shards.open_split(tiny_data, 'train')
  batches = loader.batches([source], batch_size=4, sequence_length=32, seed=1)
  skipped = ranges((8, 9), (4, 6), (5, 7))
  stream = recovery.stream(batches, step, skipped)
  left = [0, 1, 2, 3, 7, 9, 10, 11, 12, 13, 14, 15]
  for want in left[step:]:
    number, got = next(stream)
    assert number == want
    np.testing.assert_array_equal(got['tokens'], batches[want]['tokens'])


def measured(loss, updated=1.0):
  return {'loss': loss, 'gradient_norm': 2.0, 'updated': updated}


def test_a_spike_is_told_from_noise(tmp_path):
  judge = recovery.Judge(RecoveryConfig(spike=0.5, window=4), tmp_path, 0)
  # Until there are four, nothing is compared.
  for step, loss in enumerate((9.0, 3.0, 2.0, 3.0, 2.0), 1):
    assert judge.why(measured(loss), step) is None
  assert judge.why(measured(2.9), 6) is None  # mean of four: 2.5
  why = judge.why(measured(3.2), 7)  # mean 2.475
  assert why is not None and '3.200, more than run.recovery.spike=0.5' in why
  assert '2.475' in why
  assert judge.why(measured(9.0), 7) is None  # judged before
  why = judge.why(measured(float('nan'), updated=0.0), 8)
  assert why == 'loss is nan and gradient_norm 2.0'


def test_a_judge_of_a_resumed_run_knows_the_losses_before(tmp_path):
  records = metrics.MetricsFile(tmp_path, 0)
  for step, loss in enumerate((2.0, 2.0, 9.0), 1):
    records.write({'step': step, 'loss': loss})
  judge = recovery.Judge(RecoveryConfig(spike=1.0, window=2), tmp_path, 2)
  assert judge.why(measured(3.1), 3) is not None


@pytest.fixture
def experiment(tiny_data, tmp_path):
  recover = RecoveryConfig('roll_back', before=3, after=2)
  return tiny.experiment(
    tiny_data, tmp_path / 'run', 20, save_every=4, save_share=1.0, keep=4,
    log_every=1, evaluate_every=0, telemetry_every=50, recovery=recover,
  )  # fmt: skip


def wrong_at(monkeypatch, batch: int):
  """The loss of this batch is found to be wrong, whenever it is trained on."""
  judge, seen = recovery.Judge.why, []

  def why(self, measured, step):
    told = judge(self, measured, step)
    trained = recovery.batch_of(step - 1, recovery.read(seen[0]))
    return 'made up' if trained == batch else told

  init = recovery.Judge.__init__

  def remember(self, config, folder, start):
    seen[:] = [folder]
    init(self, config, folder, start)

  monkeypatch.setattr(recovery.Judge, '__init__', remember)
  monkeypatch.setattr(recovery.Judge, 'why', why)


def test_a_run_rolled_back_is_the_run_without_those_batches(
  experiment, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as patch:
    wrong_at(patch, 14)
    state = loop.train(experiment, quiet=True)
  said = capsys.readouterr().err
  # 3 before 14 is 11: checkpoint 8 has seen 0..7, checkpoint 12 would be late.
  assert 'made up at step 15: back to checkpoint 8; batches 11..16 are' in said
  [one] = json.loads((tmp_path / 'run' / 'skipped.json').read_text())
  assert (one['first'], one['stop'], one['rolled_back']) == (11, 17, True)

  named = tiny.with_run(
    experiment, folder=str(tmp_path / 'named'), skip=((11, 17),)
  )
  want = loop.train(named, quiet=True)
  assert int(state.step) == 20
  for got, leaf in zip(
    jax.tree.leaves(state), jax.tree.leaves(want), strict=True
  ):
    assert np.asarray(got).tobytes() == np.asarray(leaf).tobytes()
  records = [metrics.read(tmp_path / name) for name in ('run', 'named')]
  digests = [[r['tokens_digest'] for r in each] for each in records]
  assert digests[0] == digests[1] and len(digests[0]) == 20


def test_too_old_a_checkpoint_shortens_what_is_skipped(
  experiment, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as patch:
    wrong_at(patch, 14)
    loop.train(tiny.with_run(experiment, keep=1), quiet=True)
  assert 'back to checkpoint 12; batches 12..16 are' in capsys.readouterr().err


def test_a_run_that_is_always_wrong_ends(experiment, tmp_path):
  schedule = dataclasses.replace(
    experiment.optimizer.schedule, peak=1e30, warmup_steps=1
  )
  experiment = dataclasses.replace(
    tiny.with_run(
      experiment, recovery=RecoveryConfig('roll_back', most=2)
    ),
    optimizer=dataclasses.replace(experiment.optimizer, schedule=schedule),
  )  # fmt: skip
  with pytest.raises(
    FloatingPointError, match='rolled back 2 times before, run.recovery.most=2'
  ):
    loop.train(experiment, quiet=True)
  assert len(recovery.read(tmp_path / 'run')) == 2


def test_batches_that_were_trained_on_cannot_be_skipped(experiment, tmp_path):
  run = tiny.with_run(experiment, skip=((2, 4),))
  loop.train(run, quiet=True)
  # Twenty updates, without two: 0..21.
  with pytest.raises(
    ValueError,
    match=r'run.skip=21 30: the newest checkpoint of .* batches below 22',
  ):
    loop.train(tiny.with_run(run, skip=((2, 4), (21, 30))), quiet=True)
  loop.train(tiny.with_run(run, skip=()), quiet=True)  # it is recorded
  assert [s.first for s in recovery.read(tmp_path / 'run')] == [2]
  assert save.latest_step(tmp_path / 'run') == 20


def test_a_damaged_record_is_named(tmp_path):
  (tmp_path / 'skipped.json').write_text('[{"first": 1}]')
  with pytest.raises(ValueError, match='skipped.json is damaged: .*stop'):
    recovery.read(tmp_path)
