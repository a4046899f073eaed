# SPDX-License-Identifier: Apache-2.0
import dataclasses
import gc
import json
import os
import shutil
import sys

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from tests import tiny
from tritera_jax import experiment as experiment_lib
from tritera_jax.checkpoint import restore, save
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import loop


@pytest.fixture
def run(tiny_run, tmp_path):
  """A run of its own, to break."""
  return shutil.copytree(tiny_run, tmp_path / 'run')


def edit(run, **changes):
  file = run / 'experiment.json'
  record = json.loads(file.read_text())
  record['experiment'].update(changes)
  file.write_text(json.dumps(record))


def edit_model(run, **changes):
  model = dataclasses.asdict(save.read_experiment(run).model) | changes
  edit(run, model=model)


def test_parameters_come_back_on_one_device_as_the_state_held_them(
  tiny_data, tiny_run
):
  experiment, params = restore.restore_params(tiny_run)
  assert experiment == save.read_experiment(tiny_run)
  state = loop.train(tiny.experiment(tiny_data, tiny_run, 20), quiet=True)
  jax.tree.map(np.testing.assert_array_equal, params, state.params)
  assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {1}


@pytest.mark.parametrize('mesh', [
  MeshConfig(data=2, fsdp=1, tensor=2), MeshConfig(fsdp=1), MeshConfig(fsdp=8),
])  # fmt: skip
def test_the_whole_state_comes_back_on_another_mesh(run, mesh):
  want_experiment, want = loop.restore_run(run)
  edit(run, mesh=dataclasses.asdict(mesh))
  devices = mesh.data * mesh.fsdp * mesh.tensor
  experiment, state = loop.restore_run(run, devices=jax.devices()[:devices])
  assert experiment.mesh == mesh != want_experiment.mesh
  jax.tree.map(np.testing.assert_array_equal, state, want)
  assert int(state.step) == 20
  assert len(state.params['layers']['mlp']['up']['kernel'].devices()) == devices
  _, earlier = loop.restore_run(run, at=10, devices=jax.devices()[:devices])
  assert int(earlier.step) == 10


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'layers': 3}, 'model.layers: 2 there, 3 here'),
    ({'qk_norm': False}, 'model.qk_norm: True there, False here'),
    # These have the same arrays.
    ({'scale_blocks': 1}, 'model.scale_blocks: 2 there, 1 here'),
    ({'family': 'binary'}, "model.family: 'ternary' there, 'binary' here"),
    ({'rope_theta': 5.0}, 'model.rope_theta: 10000.0 there, 5.0 here'),
  ],
)
def test_a_checkpoint_of_another_model_is_refused(run, changes, message):
  edit_model(run, **changes)
  with pytest.raises(ValueError, match=message):
    restore.restore_params(run)


def test_a_field_that_came_later_had_its_default(run):
  file = run / 'checkpoints' / '20' / 'model' / 'metadata'
  model = json.loads(file.read_text())
  for field in ('mlp_activation', 'sub_norm', 'input_norm', 'activation_bits'):
    del model[field]
  file.write_text(json.dumps(model))
  restore.restore_params(run)
  edit_model(run, mlp_activation='relu2')
  with pytest.raises(ValueError, match="mlp_activation: 'silu' there, 'relu2'"):
    restore.restore_params(run)


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
def test_arrays_that_do_not_fit_are_refused_leaf_by_leaf(run, changes, message):
  edit_model(run, **changes)
  file = run / 'checkpoints' / '20' / 'model' / 'metadata'
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))
  with pytest.raises(ValueError, match=message):
    restore.restore_params(run)


def test_a_missing_leaf_is_named(tmp_path, tiny_run):
  experiment, state = loop.restore_run(tiny_run)
  run = tmp_path / 'run'
  save.write_experiment(tiny.with_run(experiment, folder=str(run)), run)
  state.params['layers']['mlp'].pop('up')
  with save.manager(run) as checkpoints:
    save.save(checkpoints, 1, experiment.model, state)
  with pytest.raises(ValueError, match='layers.mlp.up.kernel is missing'):
    restore.restore_params(run)


def test_a_step_that_was_not_written_to_its_end_is_none(run):
  checkpoints = run / 'checkpoints'
  half = checkpoints / '30.orbax-checkpoint-tmp'
  shutil.copytree(checkpoints / '20', half)
  (half / '_CHECKPOINT_METADATA').unlink()
  assert save.latest_step(run) == 20
  assert int(loop.restore_run(run)[1].step) == 20


@pytest.mark.parametrize('item', ['params', 'model'])
def test_a_step_without_one_of_its_items_is_named(run, item):
  shutil.rmtree(run / 'checkpoints' / '20' / item)
  with pytest.raises(
    ValueError, match=f'20/{item} (is missing|cannot be read)'
  ):
    restore.restore_params(run)
  restore.restore_params(run, 10)


def test_some_steps_are_kept_for_good(tmp_path, tiny_data):
  experiment = tiny.experiment(
    tiny_data, tmp_path / 'run', 20, save_every=4, keep=1, keep_every=8,
    evaluate_every=0,
  )  # fmt: skip
  loop.train(experiment, quiet=True)
  folders = {p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
  assert {name for name in folders if name.isdigit()} == {'8', '16', '20'}


def test_powers_of_two_are_saved_and_kept(tmp_path, tiny_data):
  experiment = tiny.experiment(
    tiny_data, tmp_path / 'run', 20, save_every=5, keep=2, keep_powers=True,
    evaluate_every=0,
  )  # fmt: skip
  loop.train(experiment, quiet=True)
  folders = {p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()}
  kept = {int(name) for name in folders if name.isdigit()}
  assert kept == {1, 2, 4, 8, 16, 20}


def test_another_ternary_setting_is_another_experiment(run):
  experiment = save.read_experiment(run)
  other = dataclasses.replace(
    experiment, model=dataclasses.replace(experiment.model, scale_blocks=1)
  )
  with pytest.raises(ValueError, match='scale_blocks: 2 there, 1 here'):
    save.write_experiment(other, run)


def mixed(run, mixture, *reweighted):
  """The run's experiment on other data."""
  experiment = save.read_experiment(run)
  data = dataclasses.replace(
    experiment.data, mixture=mixture, reweighted=reweighted
  )
  return dataclasses.replace(experiment, data=data)


AB = (('a', 0.5), ('b', 1.0))


@pytest.fixture
def mixture(run):
  """A run of 20 updates on two datasets, re-weighted after 12."""
  edit(run, data=dataclasses.asdict(mixed(run, AB, (12, (0.5, 0.5))).data))
  file = run / 'experiment.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'sources': []}))
  return run


def test_datasets_may_move_but_used_weights_are_the_experiment(mixture):
  before = (mixture / 'experiment.json').read_bytes()
  moved = (('moved/a', 0.5), ('moved/b', 1.0))
  save.write_experiment(mixed(mixture, moved, (12, (1.0, 1.0))), mixture)
  for other, batch in (
    (((('a', 0.5), ('b', 2.0)), (12, (1.0, 1.0))), 0),
    ((AB, (12, (1.0, 2.0))), 12),
    ((AB, (11, (1.0, 1.0))), 11),
    ((AB,), 12),
    ((AB, (12, (1.0, 1.0)), (19, (1.0, 3.0))), 19),
    (((*AB, ('c', 0.0)), (12, (1.0, 1.0, 1.0))), 12),
  ):
    with pytest.raises(
      ValueError,
      match=f'data.mixture: batch {batch} was drawn .* from step 20 on',
    ):
      save.write_experiment(mixed(mixture, *other), mixture)
  assert (mixture / 'experiment.json').read_bytes() == before


def test_a_mixture_changes_from_the_newest_checkpoint_on(mixture):
  """And the record says what was used until when."""
  first = json.loads((mixture / 'experiment.json').read_text())
  kept, wide = (12, (0.5, 0.5)), (12, (0.5, 0.5, 0.0))
  second = mixed(mixture, AB, kept, (20, (1.0, 3.0)))
  save.write_experiment(second, mixture)
  once = (mixture / 'experiment.json').read_bytes()
  save.write_experiment(second, mixture)
  assert (mixture / 'experiment.json').read_bytes() == once
  third = mixed(
    mixture,
    (*AB, ('c', 0.0)),
    wide,
    (20, (0.0, 1.0, 1.0)),
    (35, (1.0, 0.0, 0.0)),
  )
  save.write_experiment(third, mixture)
  assert save.read_experiment(mixture) == third
  record = json.loads((mixture / 'experiment.json').read_text())
  earlier = record['before']
  assert [each.pop('until_batch') for each in earlier] == [20, 20]
  assert earlier[0] == first
  assert earlier[1]['experiment'] == json.loads(experiment_lib.to_json(second))


def test_datasets_that_were_read_keep_their_tokens(mixture):
  join = (mixture, (*AB, ('c', 0.0)), (12, (0.5, 0.5, 0.0)))
  late = mixed(*join, (20, (0.0, 1.0, 1.0)))
  save.write_experiment(late, mixture, ['1', '2', '3'])
  save.write_experiment(late, mixture, ['1', '2', '4'])  # c was never read
  for prints, path in ((['1', '5', '4'], 'b'), (['2', '1', '4'], 'a')):
    with pytest.raises(
      ValueError, match=f'{path} has other tokens than dataset . of the 20 ba'
    ):
      save.write_experiment(late, mixture, prints)
  record = json.loads((mixture / 'experiment.json').read_text())
  assert record['sources'] == ['1', '2', '4']
  assert [b['sources'] for b in record['before']][1:] == [['1', '2', '3']]


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
    'experiment', 'digest', 'sources', 'commit', 'versions', 'devices',
  }  # fmt: skip
  assert record['versions']['jax'] == jax.__version__
  assert len(record['digest']) == 64


def largest_file(folder):
  files = [path for path in folder.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def truncate(folder):
  os.truncate(largest_file(folder), largest_file(folder).stat().st_size // 2)


def flip_a_bit(folder):
  """In the middle of an array, where nothing that reads it looks."""
  file = largest_file(folder)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 0x10
  file.write_bytes(data)


DAMAGES = {
  'truncated': truncate,
  'flipped': flip_a_bit,
  'cut metadata': lambda f: (f / 'params' / '_METADATA').write_text('{"tree'),
  'no digests': lambda folder: shutil.rmtree(folder / 'digests'),
  'no params': lambda folder: shutil.rmtree(folder / 'params'),
  'no model': lambda folder: shutil.rmtree(folder / 'model'),
  'empty model': lambda f: (f / 'model' / 'metadata').write_text(''),
}


UNRAISABLE = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@pytest.fixture
def swept(monkeypatch):
  """Reads that Orbax left in closed loops say so when they are collected."""
  yield
  monkeypatch.setattr(sys, 'unraisablehook', lambda _: None)
  for _ in range(3):
    gc.collect()


@pytest.mark.usefixtures('swept')
@UNRAISABLE
@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
  run, tiny_run, capsys, damage
):
  experiment = tiny.with_run(save.read_experiment(run), folder=str(run))
  newest = run / 'checkpoints' / '20'
  DAMAGES[damage](newest)
  with pytest.raises(ValueError, match='/checkpoints/20[/ ]'):
    loop.restore_run(run)
  state = loop.train(experiment, quiet=True)
  said = capsys.readouterr().err
  assert 'going on from the one before, of step 10' in said
  assert str(newest) in said
  _, want = loop.restore_run(tiny_run)
  for got, leaf in zip(
    jax.tree.leaves(state), jax.tree.leaves(want), strict=True
  ):
    assert np.asarray(got).tobytes() == np.asarray(leaf).tobytes()
  # Nothing is lost: it lies beside the new one.
  assert (run / 'checkpoints' / '20.damaged').is_dir()
  assert save.latest_step(run) == 20


@pytest.mark.usefixtures('swept')
@UNRAISABLE
def test_where_none_is_sound_nothing_is_trained_over(run):
  experiment = tiny.with_run(save.read_experiment(run), folder=str(run))
  for step in ('10', '20'):
    truncate(run / 'checkpoints' / step)
  with pytest.raises(
    restore.DamagedError, match='no checkpoint of .*/20/.* cannot be read.*/10/'
  ):
    loop.train(experiment, quiet=True)
  assert {'10', '20'} <= {p.name for p in (run / 'checkpoints').iterdir()}


def test_a_digest_is_that_of_the_bits_on_any_mesh():
  rng = np.random.default_rng(0)
  tree = {
    'a': rng.normal(size=(16, 24)).astype(np.float32),
    'b': rng.integers(0, 99, (8,)).astype(np.int32),
    'c': np.uint32(7),
  }
  want = int(save.digest(tree))
  mesh = jax.make_mesh((4, 2), ('x', 'y'))
  for spec in (PartitionSpec('x', 'y'), PartitionSpec('y'), PartitionSpec()):
    split = jax.device_put(tree['a'], NamedSharding(mesh, spec))
    assert int(save.digest(tree | {'a': split})) == want
  for _ in range(200):
    other = tree['a'].copy()
    bit = np.uint32(1) << np.uint32(rng.integers(32))
    other.view(np.uint32)[rng.integers(16), rng.integers(24)] ^= bit
    assert int(save.digest(tree | {'a': other})) != want
  # Nor do changes cancel: the same bit of two elements, as of two signs.
  for bit in range(32):
    other = tree['a'].copy()
    other.view(np.uint32)[[3, 7], [4, 9]] ^= np.uint32(1) << np.uint32(bit)
    assert int(save.digest(tree | {'a': other})) != want
  swapped = tree['a'].copy()
  swapped[[0, 1]] = swapped[[1, 0]]
  assert int(save.digest(tree | {'a': swapped})) != want


def test_a_periodic_save_waits_until_it_is_cheap(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(save.time, 'monotonic', lambda: now[0])

  pace = save.Pace(0.1)
  assert not pace.busy(writing=False)  # nothing is known yet
  with pace.saving():
    now[0] += 3
  now[0] += 29
  assert pace.busy(writing=False)
  now[0] += 2
  assert not pace.busy(writing=False)
  assert pace.busy(writing=True)
  assert not save.Pace(1.0).busy(writing=True)
