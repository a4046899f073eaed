# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from tests.train.test_step import EXPERIMENT as ADAMW
from tests.train.test_step import batch
from tritera_jax.checkpoint import restore, save
from tritera_jax.experiment import MuonConfig, OptimizerConfig
from tritera_jax.model import decoder
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary.schedule import TriLMSchedule
from tritera_jax.train import muon, optimizer, step

EXPERIMENT = dataclasses.replace(
  ADAMW,
  model=dataclasses.replace(ADAMW.model, qk_norm=True),
  optimizer=dataclasses.replace(ADAMW.optimizer, muon=MuonConfig()),
)
ONE = mesh_lib.MeshConfig()
FOUR = mesh_lib.MeshConfig(fsdp=2, tensor=2)


def newton_schulz(g_KN, iterations=5):
  """Each singular value by itself; the program never has one."""
  u, s, v = np.linalg.svd(np.asarray(g_KN, np.float64), full_matrices=False)
  s = s / np.sqrt((s**2).sum())
  for _ in range(iterations):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return (u * s) @ v


def parameters(rng):
  """As the decoder has them: stacked kernels, a stacked gain, a head."""
  shapes = {
    ('layers', 'up', 'kernel'): (2, 4, 7),
    ('layers', 'down', 'kernel'): (2, 7, 4),
    ('layers', 'norm', 'scale'): (2, 4),
    ('head', 'kernel'): (4, 9),
    ('embed', 'embedding'): (9, 4),
  }
  tree = {}
  for (*parents, leaf), shape in shapes.items():
    node = functools.reduce(lambda n, k: n.setdefault(k, {}), parents, tree)
    node[leaf] = rng.standard_normal(shape).astype(np.float32)
  return tree


@pytest.mark.parametrize('config', [
  MuonConfig(), MuonConfig(rate=20.0, rms=None, beta=0.9, iterations=3),
], ids=['rms', 'width'])  # fmt: skip
def test_muon_is_the_papers_and_adamw_keeps_the_rest(config):
  steps = 12
  rng = np.random.default_rng(0)
  params = parameters(rng)
  made = OptimizerConfig(
    TriLMSchedule(3e-3, 2e-3, warmup_steps=3, weight_decay=0.1), muon=config
  )
  update = optimizer.make(made, steps)
  state = update.init(params)
  ours = jax.tree.map(jnp.asarray, params)
  apply = jax.jit(update.update)
  want = jax.tree.map(lambda p: p.astype(np.float64), params)
  m = jax.tree.map(np.zeros_like, want)
  v = jax.tree.map(np.zeros_like, want)
  for t in range(steps):
    grads = jax.tree.map(
      lambda p: rng.standard_normal(p.shape).astype(np.float32), params
    )
    # Each layer is made orthogonal by itself, whatever its size.
    grads['layers']['up']['kernel'][1] *= 1e-3
    updates, state = apply(grads, state, ours)
    ours = jax.tree.map(jnp.add, ours, updates)
    norm = np.sqrt(
      sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads))
    )
    rate = (3e-3 if t < 6 else 2e-3) * (1 - t / steps) * min(1, (t + 1) / 3)
    decay = 0.1 if t < 8 else 0.0

    def after(path, w, g, m, v, t=t, norm=norm, rate=rate, decay=decay):
      g, n = g * min(1, 1 / norm), t + 1
      if path[0].key == 'layers' and path[-1].key == 'kernel':
        m[:] = config.beta * m + g
        nesterov = config.beta * m + g
        K, N = w.shape[-2:]
        factor = (
          max(1, N / K) ** 0.5
          if config.rms is None
          else config.rms * max(K, N) ** 0.5
        )
        direction = factor * np.stack(
          [newton_schulz(layer, config.iterations) for layer in nesterov]
        )
        rate *= config.rate
      else:
        m[:] = 0.9 * m + 0.1 * g
        v[:] = 0.95 * v + 0.05 * g * g
        direction = (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.95**n)) + 1e-8)
        decay *= path[-1].key != 'scale'
      return w - rate * (direction + decay * w)

    want = jax.tree_util.tree_map_with_path(after, want, grads, m, v)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
    ours,
    want,
  )


@pytest.mark.parametrize('shape', [(3, 48, 48), (3, 32, 96), (3, 96, 32)])
def test_every_layer_of_an_update_is_nearly_orthogonal(shape):
  schedule = TriLMSchedule(1.0, 1.0, warmup_steps=0, weight_decay=0.0)
  made = OptimizerConfig(schedule, muon=MuonConfig())
  update = optimizer.make(made, 10)
  rng = np.random.default_rng(1)
  sizes = np.array([1e-3, 1, 1e3]).reshape(3, 1, 1)
  grads = {'layers': {'kernel': sizes * rng.standard_normal(shape)}}
  grads = jax.tree.map(jnp.float32, grads)
  updates, _ = jax.jit(update.update)(grads, update.init(grads), grads)
  for layer in np.asarray(updates['layers']['kernel']):
    values = np.linalg.svd(layer / 0.2 / max(shape[1:]) ** 0.5)[1]
    if shape[1] != shape[2]:  # a square one has singular values near 0
      assert values.min() > 0.65
    assert values.max() < 1.25
    assert np.sqrt((layer**2).mean()) == pytest.approx(0.2, rel=0.25)


def test_only_the_kernels_of_blocks_are_muons():
  params = decoder.abstract_params(EXPERIMENT.model)
  found = {
    jax.tree_util.keystr(path, simple=True, separator='.')
    for path, label in jax.tree_util.tree_leaves_with_path(muon.labels(params))
    if label == 'muon'
  }
  assert found == {f'layers.{name}.kernel' for name in EXPERIMENT.model.linears}


def mesh_of(config):
  devices = jax.devices()[: 1 if config == ONE else 4]
  return mesh_lib.make_mesh(config, devices)


@functools.cache
def compiled():
  """The first state and the update on four devices."""
  mesh = mesh_of(FOUR)
  return step.jitted_init(EXPERIMENT, mesh), step.jitted(EXPERIMENT, mesh)


def run(start, stop, state=None):
  """Losses of the steps from `start` to `stop`, and the state after them."""
  init, update = compiled()
  losses = []
  with jax.set_mesh(mesh_of(FOUR)):
    state = init() if state is None else state
    for n in range(start, stop):
      state, measured = update(state, batch(n), n)
      losses.append(float(measured['loss']))
  return losses, state


def test_every_mesh_makes_the_same_update():
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda p: rng.standard_normal(p.shape).astype(np.float32),
    decoder.abstract_params(EXPERIMENT.model),
  )
  grads = jax.tree.map(
    lambda p: np.float32(rng.standard_normal(p.shape)), params
  )
  update = optimizer.make(
    EXPERIMENT.optimizer, 12, decoder.logical_axes(EXPERIMENT.model)
  )

  def updates(config):
    mesh = mesh_of(config)
    placed = step.shardings(EXPERIMENT, mesh)
    with jax.set_mesh(mesh):
      program = (
        jax.jit(
          lambda grads, params: update.update(
            grads, update.init(params), params
          ),
          in_shardings=(placed.params, placed.params),
          out_shardings=(placed.params, placed.opt_state),
        )
        .lower(grads, params)
        .compile()
      )
      there = jax.device_put((grads, params), (placed.params, placed.params))
      return program(*there), collectives.of(program)

  want, _ = updates(ONE)
  for config in (FOUR, mesh_lib.MeshConfig(fsdp=2, context=2)):
    got, sent = updates(config)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()
      ),
      got,
      want,
    )
    # Norms, and every matrix there and back along each axis that splits it.
    bytes_of = collectives.bytes_per_device(sent)
    assert bytes_of.keys() == {'all-reduce', 'all-to-all'}
    assert bytes_of['all-reduce'] < 200
    L, devices = EXPERIMENT.model.layers, 4
    weights = sum(
      spec[0] * spec[1] for spec in EXPERIMENT.model.linears.values()
    )
    share = 4 * weights * max(L, devices) / devices
    assert bytes_of['all-to-all'] <= 2 * 2 * share / 2


def test_it_learns_and_its_state_is_kept_in_its_shards():
  losses, state = run(0, 12)
  assert losses[-1] < losses[0] - 0.3
  # A moment lies as its parameter does; Muon has one, AdamW two.
  params = state.params
  for name, moments, kernel in (
    ('up', 1, params['layers']['mlp']['up']['kernel']),
    ('head', 2, params['head']['kernel']),
  ):
    layers = [None] * (kernel.ndim - 2)
    assert kernel.sharding.spec == PartitionSpec(
      *layers, ('fsdp', 'context'), 'tensor'
    )
    found = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
      if f"['{name}']['kernel']" in jax.tree_util.keystr(path)
    ]
    assert len(found) == moments
    assert all(leaf.sharding == kernel.sharding for leaf in found)


def test_a_checkpoint_goes_on_to_the_same_bits(tmp_path):
  want_losses, want = run(0, 4)
  _, state = run(0, 2)
  saved = jax.tree.map(np.asarray, state)
  with save.manager(tmp_path) as checkpoints:
    save.save(checkpoints, 2, EXPERIMENT.model, state)
    save.wait(checkpoints)

    def restored(experiment, config):
      target = step.abstract_state(experiment, mesh_of(config))
      return restore.restore_state(checkpoints, 2, experiment.model, target)

    losses, got = run(2, 4, restored(EXPERIMENT, FOUR))
    moved = restored(EXPERIMENT, ONE)
    # What AdamW would take for its second moments is not there.
    other = dataclasses.replace(EXPERIMENT, optimizer=ADAMW.optimizer)
    with pytest.raises(ValueError, match=r'nu\.layers\.mlp\.up.* is missing'):
      restored(other, FOUR)
  assert losses == want_losses[2:]
  jax.tree.map(np.testing.assert_array_equal, got, want)
  jax.tree.map(np.testing.assert_array_equal, moved, saved)


@pytest.mark.parametrize(('field', 'value'), [
  ('rate', 0.0), ('rms', -0.2), ('beta', 1.0), ('iterations', 0),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(field, value):
  with pytest.raises(ValueError, match=f'optimizer.muon.{field}={value} must'):
    MuonConfig(**{field: value})
