# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax import cli
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.train import bench, timing
from tritera_jax.train.bench import Options


@pytest.fixture
def experiment(tmp_path):
  return tiny.experiment(tmp_path, tmp_path, 10, peak_tflops=1.0)


def test_families_train_turn_by_turn_and_the_table_says_so(
  experiment, tmp_path, monkeypatch
):
  turns = []
  seconds = timing.Stepper.seconds

  def noted(self, steps):
    turns.append(self.experiment.model.family)
    return seconds(self, steps)

  monkeypatch.setattr(timing.Stepper, 'seconds', noted)
  said = []
  bench.run(
    {'tiny': experiment},
    Options(rounds=2, steps=1, families=('float',)),
    tmp_path / 'out',
    said.append,
  )
  own, float_ = (json.loads(line) for line in said)
  assert turns == ['ternary', 'float'] * 3  # the first compile
  assert (own['family'], float_['family']) == ('ternary', 'float')
  over = float_['own_over_this']
  assert 0 < over['min'] <= over['median'] <= over['max']
  assert own['tokens_per_second'] == pytest.approx(8 * 32 / own['step_seconds'])
  assert own['mfu'] == pytest.approx(
    own['tflops_per_second'] / jax.device_count()
  )
  # Two moments, latents and counters lie as the mesh has it.
  assert own['arguments'] == float_['arguments'] > 0
  text = (tmp_path / 'out' / 'train.md').read_text()
  assert '| tiny | TriLM | 8 | none, xla |' in text
  assert '| tiny | FloatLM | 8 | none, xla |' in text
  lines = (tmp_path / 'out' / 'train.jsonl').read_text().splitlines()
  assert {'command', 'date', 'machine'} <= set(json.loads(lines[0]))
  assert [json.loads(line) for line in lines[1:]] == [own, float_]


def test_a_layout_without_room_is_left_out_and_the_fastest_is_taken(
  experiment, monkeypatch
):
  class Fake(timing.Stepper):
    compile_seconds = 1.0

    def __init__(self, experiment, mesh):
      self.experiment = experiment

    def seconds(self, steps):
      if self.experiment.run.remat == 'none':
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
      # Twice the rows in less than twice the time.
      return {4: 1.0, 8: 1.5}[self.experiment.data.batch_size]

    def optimizer_seconds(self):
      return 0.1

    def memory(self):
      return {'arguments': 1, 'temporaries': 2}

  monkeypatch.setattr(bench, 'Stepper', Fake)
  monkeypatch.setattr(bench, '_telemetry_seconds', lambda stepper: 0.1)
  options = Options(rows=(4, 8), remats=('none', 'block'), families=())
  *tried, best = bench.rows('tiny', experiment, options)
  assert [row.get('skipped') for row in tried] == [
    'no room on the device', None, 'no room on the device', None,
  ]  # fmt: skip
  assert (best['batch'], best['remat']) == (8, 'block')
  assert best['tokens_per_second'] == pytest.approx(8 * 32 / 1.5)
  assert 'no room on the device' in bench.markdown({}, [*tried, best])
  with pytest.raises(ValueError, match='tiny: no layout has room'):
    list(bench.rows('tiny', experiment, Options(remats=('none', 'none'))))


def test_an_attention_that_is_not_here_is_a_row(experiment):
  """cuDNN's, on a CPU."""
  model = dataclasses.replace(experiment.model, dtype='bfloat16')
  experiment = dataclasses.replace(experiment, model=model)
  options = Options(
    rounds=1, steps=1, attentions=('cudnn', 'xla'), families=()
  )  # fmt: skip
  first, second, best = bench.rows('tiny', experiment, options)
  assert first['attention'] == 'cudnn' and 'cuDNN' in first['skipped']
  assert 'skipped' not in second and best['attention'] == 'xla'


def test_nothing_comes_from_the_host_while_the_clock_runs(experiment):
  stepper = timing.Stepper(experiment, mesh_lib.make_mesh(experiment.mesh))
  assert stepper.seconds(1) > 0 and stepper.optimizer_seconds() > 0
  assert int(stepper.state.step) == 1
  stepper.tokens_BT1 = np.asarray(stepper.tokens_BT1)  # on the host
  with pytest.raises(jax.errors.JaxRuntimeError, match='isallowed'):
    stepper.seconds(1)


def test_a_step_that_updates_nothing_is_no_figure(experiment):
  data = dataclasses.replace(experiment.data, seed=1)
  experiment = dataclasses.replace(experiment, data=data)
  stepper = timing.Stepper(experiment, mesh_lib.make_mesh(experiment.mesh))
  stepper.n = 5  # not its next
  with pytest.raises(FloatingPointError, match='lower the learning rate'):
    stepper.seconds(1)


def test_the_command_needs_an_experiment(capsys):
  assert cli.main(['bench', 'train']) == 1
  assert 'name one, or give --spectra' in capsys.readouterr().err
  with pytest.raises(SystemExit) as stop:
    cli.main(['bench', 'kernels'])
  assert stop.value.code == 2
  options, named = bench.spectra(Options())
  assert [e.model.layers for e in named.values()] == [16, 24, 24]
  assert options.rows and options.remats
