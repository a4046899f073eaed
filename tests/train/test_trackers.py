# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from tests import tiny
from tritera_jax.train import loop, metrics, throughput, trackers


def events(folder):
  """Scalars by (tag, step), from the files' own framing (TFRecord)."""
  found = {}
  for file in sorted(folder.glob('events.out.tfevents.*')):
    data = file.read_bytes()
    while data:
      (length,) = struct.unpack('<Q', data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      for value in event.summary.value:
        found[value.tag, event.step] = value.simple_value
      data = data[16 + length :]
  return found


def test_tensorboard_gets_every_number_of_the_records(tiny_data, tmp_path):
  run = tmp_path / 'run'
  loop.train(tiny.experiment(tiny_data, run, 10, tensorboard=True), quiet=True)
  shown = events(run / 'tensorboard')
  told = 0
  for record in metrics.read(run):
    for name in ('loss', 'learning_rate', 'zero_fraction', 'held_out_loss'):
      if name in record:
        assert shown[name, record['step']] == pytest.approx(record[name])
        told += 1
  assert told > 12
  assert shown['matrices/mlp.up/scale', 5] > 0


class Refused(Exception):
  pass


@pytest.fixture
def wandb(monkeypatch, tmp_path):
  """Stands in for the library, which may not be there; keeps what it gets."""
  module = types.ModuleType('wandb')
  module.Error, module.started, module.logged = Refused, [], []
  module.reachable = True

  def init(*, mode, **arguments):
    if mode != 'offline' and not module.reachable:
      raise Refused('no route to host')
    module.started.append(arguments | {'mode': mode})
    return types.SimpleNamespace(
      log=lambda scalars, step: module.logged.append((step, scalars)),
      finish=lambda: module.logged.append('finished'),
    )

  module.init = init
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('WANDB_API_KEY', raising=False)
  monkeypatch.delenv('WANDB_MODE', raising=False)
  return module


def test_wandb_without_a_key_is_offline(wandb, tiny_data, tmp_path):
  run = tmp_path / 'run'
  experiment = tiny.experiment(tiny_data, run, 6, wandb='tri', log_every=3)
  loop.train(experiment, quiet=True)
  [started] = wandb.started
  assert started['mode'] == 'offline' and started['project'] == 'tri'
  assert started['config'] == dataclasses.asdict(experiment)
  *logged, last = wandb.logged
  assert last == 'finished'
  assert [step for step, _ in logged] == [3, 5, 6]
  records = {r['step']: r for r in metrics.read(run)}
  assert logged[0][1]['loss'] == records[3]['loss']


def test_wandb_that_cannot_be_reached_does_not_stop_training(
  wandb, monkeypatch, tmp_path
):
  monkeypatch.setenv('WANDB_API_KEY', 'k')
  wandb.reachable = False
  with pytest.warns(UserWarning, match='wandb goes on offline: no route'):
    trackers.WandB(tmp_path, 'tri', {})
  wandb.reachable = True
  trackers.WandB(tmp_path, 'tri', {})
  modes, ids = zip(*[(s['mode'], s['id']) for s in wandb.started], strict=True)
  assert modes == ('offline', None)
  assert ids[0] == ids[1]


def test_wandb_that_is_not_there_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ValueError, match='pip install wandb'):
    trackers.WandB(tmp_path, 'tri', {})


@pytest.mark.parametrize(
  ('kind', 'peak'),
  [
    # Makers' data sheets: dense bfloat16.
    ('NVIDIA H200', 989.0),
    ('NVIDIA H100 80GB HBM3', 989.0),
    ('NVIDIA H100 PCIe', 756.0),
    ('NVIDIA A100-SXM4-80GB', 312.0),
    ('TPU v5 lite', 197.0),
    ('TPU v5p', 459.0),
    ('TPU v4', 275.0),
    ('cpu', None),
  ],
)
def test_the_peak_of_a_device_is_that_of_its_data_sheet(tmp_path, kind, peak):
  experiment = tiny.experiment(tmp_path, tmp_path, 10)
  assert throughput.peak_tflops(experiment, kind) is None  # float32
  model = dataclasses.replace(experiment.model, dtype='bfloat16')
  experiment = dataclasses.replace(experiment, model=model)
  assert throughput.peak_tflops(experiment, kind) == peak


def test_speed_follows_from_its_formulas(tmp_path):
  experiment = tiny.experiment(tmp_path, tmp_path, 100, peak_tflops=2.0)
  got = throughput.measures(experiment, step=40, steps=10, seconds=5.0)
  model = experiment.model
  # By hand: 2 layers of q 48x48, k, v 48x24, o 48x48, three of 48x96, and
  # the head of 48x512; a multiply-add is two, backward is twice forward.
  weights = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96) + 48 * 512
  attention = 2 * 32 * 48  # L T D, half of T x T for q k^T and for its values
  per_token = 6 * (weights + attention)
  assert model.padded_vocab_size == 512
  assert got['step_seconds'] == 0.5
  assert got['tokens_per_second'] == 8 * 32 / 0.5
  assert got['eta_seconds'] == 30.0
  tflops = per_token * 512 / 1e12
  assert got['tflops_per_second'] == pytest.approx(tflops)
  assert got['mfu'] == pytest.approx(tflops / (8 * 2.0))  # eight host devices


def test_a_record_is_flattened_by_path():
  record = json.loads('{"step": 3, "a": 1, "b": {"c": {"d": 2.5}, "e": "x"}}')
  assert trackers.flat(record) == {'a': 1.0, 'b/c/d': 2.5}
