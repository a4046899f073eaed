# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax.checkpoint import restore
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import loop, metrics


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Interrupted(Exception):
  pass


@pytest.mark.parametrize('at', [10, 13])
def test_an_interrupted_run_goes_on_to_the_same_bits(
  tiny_data, tiny_run, tmp_path, monkeypatch, at
):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  write = metrics.MetricsFile.write

  def interrupt(self, record):
    write(self, record)
    if record['step'] >= at:
      raise Interrupted

  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    patch.setattr(metrics.MetricsFile, 'write', interrupt)
    # Step 10 is saved after its record: interrupt the one after it.
    loop.train(experiment, quiet=True)
  loop.train(experiment, quiet=True)

  _, got = restore.restore_params(tmp_path / 'run')
  _, want = restore.restore_params(tiny_run)
  assert bits(got) == bits(want)
  ours, theirs = metrics.read(tmp_path / 'run'), metrics.read(tiny_run)
  assert [r['step'] for r in ours] == [r['step'] for r in theirs]
  assert [r['loss'] for r in ours] == [r['loss'] for r in theirs]


def test_a_finished_run_is_left_as_it_is(tiny_data, tiny_run):
  before = (tiny_run / 'metrics.jsonl').read_text()
  state = loop.train(tiny.experiment(tiny_data, tiny_run, 20), quiet=True)
  assert int(state.step) == 20
  assert (tiny_run / 'metrics.jsonl').read_text() == before


def test_metrics_and_telemetry_are_recorded(tiny_run):
  records = {r['step']: r for r in metrics.read(tiny_run)}
  # Every second, every fifth (telemetry), every tenth (held-out) step.
  assert sorted(records) == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20]
  assert math.log(384) - 0.5 < records[2]['loss'] < math.log(384) + 0.5
  assert records[20]['loss'] < records[2]['loss'] - 0.5
  assert records[20]['held_out_loss'] < records[10]['held_out_loss']
  for step in (5, 10, 15, 20):
    told = records[step]
    assert 0.2 < told['zero_fraction'] < 0.5
    assert 0 <= told['flip_fraction'] < 0.2
    assert set(told['matrices']) == set(tiny.MODEL.linears)
  assert metrics.plot(tiny_run).stat().st_size > 10_000


def test_the_run_folder_of_another_experiment_is_refused(tiny_data, tiny_run):
  other = tiny.experiment(tiny_data, tiny_run, 30)
  with pytest.raises(ValueError, match='run.steps: 20 there, 30 here'):
    loop.train(other, quiet=True)


def test_how_often_to_look_may_change(tiny_data, tiny_run):
  experiment = tiny.experiment(tiny_data, tiny_run, 20)
  experiment = tiny.with_run(experiment, log_every=7, keep=5)
  loop.train(
    dataclasses.replace(experiment, mesh=MeshConfig(fsdp=8)), quiet=True
  )


def test_a_model_for_another_tokenizer_is_refused(tiny_data, tmp_path):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  model = dataclasses.replace(experiment.model, vocab_size=500)
  with pytest.raises(ValueError, match='has 384 tokens; set --model.vocab-s'):
    loop.train(dataclasses.replace(experiment, model=model), quiet=True)
  assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_finite_stops_the_run(
  tiny_data, tmp_path, monkeypatch
):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  schedule = dataclasses.replace(
    experiment.optimizer.schedule, peak=1e30, warmup_steps=1
  )
  optimizer = dataclasses.replace(experiment.optimizer, schedule=schedule)
  with pytest.raises(
    FloatingPointError, match=r'(loss|gradient_norm) is .* at step'
  ):
    loop.train(dataclasses.replace(experiment, optimizer=optimizer), quiet=True)
