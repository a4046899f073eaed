# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import os
from pathlib import Path
import re
import signal
import sysconfig

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax.checkpoint import restore, save
from tritera_jax.data import prepare
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
    assert 0 < told['scale_drift'] < 0.2
    assert set(told['matrices']) == set(tiny.MODEL.linears)
    assert told['tokens'] == step * 8 * 32
    assert told['perplexity'] == pytest.approx(math.exp(told['loss']))
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


def test_a_loss_that_is_not_finite_stops_the_run_and_saves(tiny_data, tmp_path):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  schedule = dataclasses.replace(
    experiment.optimizer.schedule, peak=1e30, warmup_steps=1
  )
  optimizer = dataclasses.replace(experiment.optimizer, schedule=schedule)
  experiment = dataclasses.replace(experiment, optimizer=optimizer)
  said = []
  for _ in range(2):  # again, it stops at the same step
    with pytest.raises(
      FloatingPointError, match=r'at step \d+; .* saved as checkpoint'
    ) as error:
      loop.train(experiment, quiet=True)
    said.append(str(error.value))
  assert said[0] == said[1]
  bad = int(re.search(r'at step (\d+)', said[0])[1])
  _, state = loop.restore_run(tmp_path / 'run')
  assert int(state.step) == bad - 1 == save.latest_step(tmp_path / 'run')
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
  assert all(r['step'] < bad for r in metrics.read(tmp_path / 'run'))


def send_at(monkeypatch, step, number):
  """The process gets a signal while step `step` is recorded."""
  write = metrics.MetricsFile.write

  def send(self, record):
    write(self, record)
    if record['step'] == step:
      os.kill(os.getpid(), number)

  monkeypatch.setattr(metrics.MetricsFile, 'write', send)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_to_the_same_bits(
  tiny_data, tiny_run, tmp_path, monkeypatch, number
):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  handler = signal.getsignal(number)
  with monkeypatch.context() as patch:
    send_at(patch, 14, number)
    with pytest.raises(loop.Stopped, match='after step 14, .* goes on') as e:
      loop.train(experiment, quiet=True)
  assert e.value.number == number
  assert signal.getsignal(number) == handler
  assert save.latest_step(tmp_path / 'run') == 14
  loop.train(experiment, quiet=True)
  _, got = restore.restore_params(tmp_path / 'run')
  _, want = restore.restore_params(tiny_run)
  assert bits(got) == bits(want)
  digests = [
    {r['step']: r['tokens_digest'] for r in metrics.read(run)}
    for run in (tmp_path / 'run', tiny_run)
  ]
  assert digests[0] == digests[1]


def test_a_profile_is_recorded_at_a_step_and_at_a_signal(
  tiny_data, tmp_path, monkeypatch
):
  experiment = tiny.experiment(
    tiny_data, tmp_path / 'run', 12, profile_at=3, profile_steps=2
  )
  traced = []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda path: traced.append(path)
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: traced.append('end'))
  send_at(monkeypatch, 8, signal.SIGUSR1)
  loop.train(experiment, quiet=True)
  assert traced == [tmp_path / 'run' / 'profile', 'end'] * 2


def second_dataset(tiny_data, folder, **arguments):
  corpus = Path(sysconfig.get_path('stdlib')) / 'email'
  prepare.prepare(str(corpus), str(folder), holdout=0.3, **arguments)
  return str(folder)


def test_a_mixture_is_trained_on_and_its_limits_are_kept(tiny_data, tmp_path):
  tokenizer = str(tiny_data / 'tokenizer.json')
  other = second_dataset(tiny_data, tmp_path / 'b', tokenizer=tokenizer)
  experiment = tiny.experiment(
    tiny_data, tmp_path / 'run', 10, accumulation=2, remat='block'
  )
  mixture = ((str(tiny_data), 1.0), (other, 3.0))
  data = dataclasses.replace(experiment.data, mixture=mixture)
  experiment = dataclasses.replace(experiment, data=data)
  assert int(loop.train(experiment, quiet=True).step) == 10
  limited = dataclasses.replace(
    experiment, data=dataclasses.replace(data, max_epochs=0.01)
  )
  with pytest.raises(
    ValueError, match=r'would be read 0\.\d+ times in 80 windows, more than'
  ):
    loop.train(limited, quiet=True)

  foreign = second_dataset(tiny_data, tmp_path / 'c', vocab_size=384)
  mixture = ((str(tiny_data), 1.0), (foreign, 1.0))
  data = dataclasses.replace(data, mixture=mixture)
  with pytest.raises(ValueError, match=r'the tokenizers of .*/c and .* differ'):
    loop.train(dataclasses.replace(experiment, data=data), quiet=True)


def test_a_separator_that_is_not_the_datas_is_refused(tiny_data, tmp_path):
  experiment = tiny.experiment(tiny_data, tmp_path / 'run', 20)
  model = dataclasses.replace(experiment.model, document_separator=5)
  with pytest.raises(
    ValueError, match='end with token 0; set --model.document-separator 0'
  ):
    loop.train(dataclasses.replace(experiment, model=model), quiet=True)
