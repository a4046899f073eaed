# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from tests.model.test_decoder import TINY
from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model import decoder
from tritera_jax.parallel import digest as digest_lib
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary.schedule import TriLMSchedule
from tritera_jax.train import optimizer, step

MODEL = dataclasses.replace(
  TINY, d_model=32, d_ff=64, heads=4, kv_heads=4, head_dim=8, init_std=0.05
)
EXPERIMENT = Experiment(
  MODEL,
  DataConfig('unused', batch_size=8, sequence_length=16),
  OptimizerConfig(TriLMSchedule(3e-3, 2e-3, warmup_steps=3, weight_decay=0.1)),
  RunConfig('unused', steps=12),
)


def batch(n, rows=8):
  """A learnable stream: each token follows from the one before."""
  rng = np.random.default_rng(n)
  first = rng.integers(0, 100, (rows, 1))
  return ((first + 7 * np.arange(17)) % 100).astype(np.int32)


def test_adamw_is_the_textbook_one_with_clipping_and_masked_decay():
  config, steps = EXPERIMENT.optimizer, 12
  rng = np.random.default_rng(0)
  params = {
    'kernel': rng.standard_normal((3, 4)).astype(np.float32),
    'scale': rng.standard_normal(4).astype(np.float32),
  }
  update = optimizer.make(config, steps)
  state = update.init(params)
  ours = jax.tree.map(jnp.asarray, params)
  want = {k: v.astype(np.float64) for k, v in params.items()}
  m = {k: np.zeros_like(v) for k, v in want.items()}
  v = {k: np.zeros_like(v) for k, v in want.items()}
  for t in range(steps):
    grads = {
      k: (3 * rng.standard_normal(p.shape)).astype(np.float32)
      for k, p in params.items()
    }
    updates, state = update.update(grads, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum()
                       for g in grads.values()))  # fmt: skip
    peak = 3e-3 if t < 6 else 2e-3
    rate = peak * (1 - t / steps) * min(1, (t + 1) / 3)
    for k, g in grads.items():
      g = g * min(1, 1.0 / norm)
      m[k] = 0.9 * m[k] + 0.1 * g
      v[k] = 0.95 * v[k] + 0.05 * g * g
      direction = (m[k] / (1 - 0.9 ** (t + 1))) / (
        np.sqrt(v[k] / (1 - 0.95 ** (t + 1))) + 1e-8
      )
      decay = 0.1 if k == 'kernel' and t < 8 else 0.0
      want[k] = want[k] - rate * (direction + decay * want[k])
  for k in params:
    np.testing.assert_allclose(ours[k], want[k], rtol=2e-5, atol=1e-6)


def test_only_matrices_are_decayed():
  mask = optimizer.decayed(step.init_state(EXPERIMENT).params)
  kept = {
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask)
    if not leaf
  }
  assert kept == {
    "['layers']['attention_norm']['scale']",
    "['layers']['mlp_norm']['scale']",
    "['norm']['scale']",
  }


def losses(experiment, mesh_config, devices, steps):
  mesh = mesh_lib.make_mesh(mesh_config, jax.devices()[:devices])
  with jax.set_mesh(mesh):
    state = step.jitted_init(experiment, mesh)()
    initial = jax.tree.map(np.asarray, state.params)
    update = step.jitted(experiment, mesh)
    history = []
    for n in range(steps):
      state, metrics = update(state, batch(n), n)
      history.append(float(metrics['loss']))
  return initial, history, state


def test_training_learns_and_every_mesh_takes_the_same_road():
  experiment = dataclasses.replace(
    EXPERIMENT, run=dataclasses.replace(EXPERIMENT.run, steps=100)
  )
  initial, want, _ = losses(experiment, mesh_lib.MeshConfig(), 1, 100)
  assert want[-1] < 0.5 * want[0]
  for devices, mesh in (
    (2, mesh_lib.MeshConfig(data=2, fsdp=1)),
    (4, mesh_lib.MeshConfig(fsdp=2, tensor=2)),
    (8, mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2)),
  ):
    other, got, _ = losses(experiment, mesh, devices, 100)
    jax.tree.map(np.testing.assert_array_equal, initial, other)
    # Gradients are summed in another order, and a code may flip a step
    # earlier or later for it.
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_state_is_made_and_kept_in_its_shards():
  config = mesh_lib.MeshConfig(fsdp=4, tensor=2)
  _, _, state = losses(EXPERIMENT, config, 8, 1)
  kernel = state.params['layers']['mlp']['up']['kernel']
  assert kernel.sharding.spec == PartitionSpec(
    None, ('fsdp', 'context'), 'tensor'
  )
  assert kernel.addressable_shards[0].data.shape == (2, 8, 32)
  moments = [
    leaf
    for leaf in jax.tree.leaves(state.opt_state)
    if leaf.shape == kernel.shape
  ]
  assert len(moments) >= 2
  assert all(m.sharding == kernel.sharding for m in moments)


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
  with pytest.raises(ValueError, match='takes 3 devices, but there are 8'):
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=3, fsdp=1))
  with pytest.raises(ValueError, match='only one of data, fsdp may be -1'):
    mesh_lib.make_mesh(mesh_lib.MeshConfig(data=-1))


def grown(state, tokens, experiment=EXPERIMENT, n=0):
  return jax.jit(
    lambda state, tokens: step.train_step(experiment, state, tokens, n)
  )(state, tokens)


def with_run(**fields):
  run = dataclasses.replace(EXPERIMENT.run, **fields)
  return dataclasses.replace(EXPERIMENT, run=run)


def close(a, b, rtol=1e-4):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=rtol, atol=rtol * float(jnp.abs(y).max())
    ),
    a,
    b,
  )


@pytest.mark.parametrize('parts', [2, 4])
@pytest.mark.parametrize('devices', [1, 2])
def test_a_batch_in_parts_makes_the_same_update(parts, devices):
  state = step.init_state(EXPERIMENT)
  want, measured = grown(state, batch(0))
  # Adam's first step is the sign of the gradient: its moments tell more.
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:devices])
  experiment = with_run(accumulation=parts)
  with jax.set_mesh(mesh):
    got, told = step.jitted(experiment, mesh)(state, batch(0), 0)
  close(got.opt_state, want.opt_state)
  for name in ('loss', 'gradient_norm'):
    assert float(told[name]) == pytest.approx(float(measured[name]), rel=1e-5)
  assert got.tokens_digest == want.tokens_digest


@pytest.mark.parametrize('remat', ['dots', 'block'])
def test_computing_again_makes_the_same_update(remat):
  state = step.init_state(EXPERIMENT)
  want, _ = grown(state, batch(0))
  got, _ = grown(state, batch(0), with_run(remat=remat))
  close(got.opt_state, want.opt_state)


def test_the_z_loss_is_added_to_what_is_minimised():
  optimizer = dataclasses.replace(EXPERIMENT.optimizer, z_loss=0.1)
  experiment = dataclasses.replace(EXPERIMENT, optimizer=optimizer)
  state, tokens = step.init_state(EXPERIMENT), batch(0)
  _, plain = grown(state, tokens)
  _, measured = grown(state, tokens, experiment)
  logits, _ = decoder.bind(MODEL, state.params)(jnp.asarray(tokens[:, :-1]))
  log_z = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))
  assert float(measured['z_loss']) == pytest.approx(
    0.1 * (log_z**2).mean(), rel=1e-5
  )
  assert measured['loss'] == plain['loss']
  assert measured['gradient_norm'] != plain['gradient_norm']


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_what_is_not_finite_updates_nothing_then_or_later():
  state = step.init_state(EXPERIMENT)
  kernel = state.params['head']['kernel']
  state.params['head']['kernel'] = kernel.at[0, 0].set(jnp.inf)
  after, measured = grown(state, batch(0))
  assert not measured['updated'] and not np.isfinite(measured['loss'])
  assert bits(after) == bits(state)
  state.params['head']['kernel'] = kernel
  # Batch 1 is not the next of a state that waits for batch 0.
  after, measured = grown(state, batch(1), n=1)
  assert not measured['updated'] and np.isfinite(measured['loss'])
  assert bits(after) == bits(state)


def test_the_digest_tells_batches_their_order_and_their_places():
  def digest(*batches):
    value = jnp.uint32(0)
    for one in batches:
      value = digest_lib.chained(value, digest_lib.digest(one))
    return int(value)

  a, b = batch(0), batch(1)
  streams = [(a,), (b,), (a, b), (b, a), (a, a, b), (a[::-1],), (a[:, ::-1],)]
  assert len({digest(*stream) for stream in streams}) == len(streams)
  # A zero in place of a zero row is seen too: tokens count from 1.
  assert digest(0 * a) != digest(0 * a, 0 * a) != 0


def test_parts_that_the_mesh_cannot_divide_are_refused():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  with pytest.raises(
    ValueError,
    match=r'batch_size=8 must be a multiple of run.accumulation=4 x '
    r'mesh.data=2 x mesh.fsdp=2',
  ):
    step.jitted(with_run(accumulation=4), mesh)
  with pytest.raises(ValueError, match='accumulation=3 must divide'):
    with_run(accumulation=3)
