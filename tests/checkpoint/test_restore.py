# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax.checkpoint import restore, save
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.train import loop, step


@pytest.fixture
def run(tiny_run, tmp_path):
  """A run of its own, to break."""
  return shutil.copytree(tiny_run, tmp_path / 'run')


def edit(run, **changes):
  file = run / 'experiment.json'
  record = json.loads(file.read_text())
  record['experiment']['model'].update(changes)
  file.write_text(json.dumps(record))


def test_parameters_come_back_on_one_device_as_the_state_held_them(
  tiny_data, tiny_run
):
  experiment, params = restore.restore_params(tiny_run)
  assert experiment == save.read_experiment(tiny_run)
  state = loop.train(tiny.experiment(tiny_data, tiny_run, 20), quiet=True)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {1}


@pytest.mark.parametrize('devices', [1, 4])
def test_the_whole_state_comes_back_on_another_mesh(tiny_run, devices):
  experiment, params = restore.restore_params(tiny_run)
  mesh = mesh_lib.make_mesh(
    mesh_lib.MeshConfig(fsdp=-1), jax.devices()[:devices]
  )
  target = step.abstract_state(experiment, mesh)
  with save.manager(tiny_run) as checkpoints:
    items = restore.restore(
      checkpoints,
      20,
      params=target.params,
      rest={'step': target.step, 'opt_state': target.opt_state},
    )
  jax.tree.map(np.testing.assert_array_equal, items['params'], params)
  kernel = items['params']['layers']['mlp']['up']['kernel']
  assert len(kernel.devices()) == devices
  assert int(items['rest']['step']) == 20


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    # Orbax would load two layers into three, padding.
    ({'layers': 3}, r'norm.* is float32\[2, .*takes float32\[3, '),
    ({'layers': 1}, r'is float32\[2, .*takes float32\[1, '),
    ({'d_ff': 192}, r'mlp.down.kernel is float32\[2, 96, 48\]'),
    ({'qk_norm': False}, 'layers.attention.k_norm.scale is extra'),
  ],
)
def test_a_model_that_does_not_fit_is_refused_leaf_by_leaf(
  run, changes, message
):
  edit(run, **changes)
  with pytest.raises(ValueError, match=message):
    restore.restore_params(run)


def test_a_missing_leaf_is_named(tmp_path, tiny_run):
  experiment, params = restore.restore_params(tiny_run)
  run = tmp_path / 'run'
  save.write_experiment(tiny.with_run(experiment, folder=str(run)), run)
  params['layers']['mlp'].pop('up')
  with save.manager(run) as checkpoints:
    save.save(checkpoints, 1, params=params, rest={'step': np.int32(1)})
  with pytest.raises(ValueError, match='layers.mlp.up.kernel is missing'):
    restore.restore_params(run)


def test_another_ternary_setting_is_another_experiment(run):
  experiment = save.read_experiment(run)
  other = dataclasses.replace(
    experiment, model=dataclasses.replace(experiment.model, scale_blocks=1)
  )
  with pytest.raises(ValueError, match='scale_blocks: 2 there, 1 here'):
    save.write_experiment(other, run)


def test_what_is_not_there_is_said(tmp_path, tiny_run):
  with pytest.raises(FileNotFoundError, match='is not a run folder'):
    restore.restore_params(tmp_path)
  with pytest.raises(FileNotFoundError, match=r'step 7; it has \[10, 20\]'):
    restore.restore_params(tiny_run, 7)


def test_a_record_that_is_damaged_is_said(run):
  (run / 'experiment.json').write_text('{"experiment": ')
  with pytest.raises(ValueError, match=r'is not an experiment record'):
    restore.restore_params(run)


def test_the_record_says_what_made_the_run(tiny_run):
  record = json.loads((tiny_run / 'experiment.json').read_text())
  assert set(record) == {
    'experiment', 'digest', 'commit', 'versions', 'devices',
  }  # fmt: skip
  assert record['versions']['jax'] == jax.__version__
  assert len(record['digest']) == 64
