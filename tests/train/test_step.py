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
      state, metrics = update(state, batch(n))
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
  assert kernel.sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')
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
