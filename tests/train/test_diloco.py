# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_step import EXPERIMENT, batch
from tritera_jax.experiment import DiLoCoConfig, MuonConfig
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import diloco, step


def experiment(muon=False, batch_size=8, **config):
  config = DiLoCoConfig(**{'workers': 4, 'every': 3, **config})
  return dataclasses.replace(
    EXPERIMENT,
    optimizer=dataclasses.replace(
      EXPERIMENT.optimizer,
      diloco=config,
      muon=MuonConfig() if muon else None,
    ),
    data=dataclasses.replace(EXPERIMENT.data, batch_size=batch_size),
    run=dataclasses.replace(EXPERIMENT.run, loss_chunk=16),
  )


def levels_by_integration(count):
  """Lloyd's iteration on a fine grid of the normal's density."""
  x = np.linspace(-8, 8, 400_001)
  density = np.exp(-(x**2) / 2)
  levels = np.linspace(-1.5, 1.5, count)
  for _ in range(500):
    nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    levels = np.array(
      [np.average(x[nearest == i], weights=density[nearest == i])
       for i in range(count)]
    )  # fmt: skip
  return levels


def rounded(x, bits):
  """The oracle's Q, of float64 rows."""
  scale = np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
  levels = diloco.normal_levels(2**bits)
  relative = x / np.where(scale > 0, scale, 1)
  nearest = np.abs(relative[..., None] - levels).argmin(axis=-1)
  return levels[nearest] * scale


def textbook(config, before: step.TrainState, tokens_BT1):
  """A step of DiLoCo's algorithm, worker by worker, in float64 between them."""
  settings = config.optimizer.diloco
  alone = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, diloco=None)
  )
  update = jax.jit(functools.partial(step._update, alone))
  theta, old = before.params, before.opt_state
  take = lambda tree, w: jax.tree.map(lambda leaf: leaf[w], tree)
  rows = np.split(tokens_BT1, settings.workers)
  after = [
    update(take(old.workers, w), take(old.inner, w), mine)
    for w, mine in enumerate(rows)
  ]
  loss = np.mean([measured['loss'] for *_, measured in after])
  workers = [params for params, *_ in after]
  if (int(before.step) + 1) % settings.every:
    return loss, theta, old.momentum, workers

  def agreed(path, t, u, *mine):
    # Gains are not worth it; the rows of all matrices are whole bytes.
    if settings.bits < 32 and path[-1].key != 'scale':
      kept = kept_at[path]
      mine = [
        rounded(np.float64(t - one) + kept[w], settings.bits)
        for w, one in enumerate(mine)
      ]
    else:
      mine = [np.float64(t - one) for one in mine]
    mean = sum(mine) / len(mine)
    mu, eta = settings.momentum, settings.rate
    u = mu * u + eta * mean
    return t - mu * u - eta * mean, u

  kept_at = dict(jax.tree_util.tree_leaves_with_path(old.kept_back))
  both = jax.tree_util.tree_map_with_path(agreed, theta, old.momentum, *workers)
  theta, u = jax.tree.transpose(
    jax.tree.structure(theta), jax.tree.structure((0, 0)), both
  )
  return loss, theta, u, [theta] * len(workers)


@pytest.mark.parametrize(
  'settings, mesh',
  [
    ({}, MeshConfig(data=4, fsdp=2)),
    ({'bits': 4, 'workers': 2}, MeshConfig(data=1, fsdp=4, tensor=2)),
    ({'bits': 2, 'muon': True}, MeshConfig(data=2, fsdp=2, tensor=2)),
  ],
)
def test_it_is_the_algorithm_on_every_mesh(settings, mesh):
  config = experiment(**settings)
  mesh = mesh_lib.make_mesh(mesh)
  with jax.set_mesh(mesh):
    state = step.jitted_init(config, mesh)()
    update = step.jitted(config, mesh)
  for n in range(6):  # two agreements: the second has momentum and leftovers
    before = jax.device_get(state)
    tokens = batch(n, config.data.batch_size)
    with jax.set_mesh(mesh):
      state, measured = update(
        state, jax.device_put(tokens, step.batch_sharding(mesh)), n
      )
    loss, theta, u, workers = textbook(config, before, tokens)
    assert float(measured['loss']) == pytest.approx(loss, rel=2e-5)
    found = jax.device_get(state)
    stacked = jax.tree.map(lambda *each: np.stack(each), *workers)
    for got, want in zip(
      jax.tree.leaves(
        (found.params, found.opt_state.momentum, found.opt_state.workers)
      ),
      jax.tree.leaves((theta, u, stacked)),
      strict=True,
    ):
      # A value on an edge between two levels may fall to either side.
      wrong = ~np.isclose(got, want, rtol=1e-4, atol=2e-5)
      assert wrong.sum() <= 2e-3 * wrong.size, (n, wrong.mean())


def test_workers_that_agree_after_one_step_by_sgd_of_rate_one_are_one():
  """theta - mean(theta - theta_w) is the mean of theta_w."""
  config = experiment(every=1, rate=1.0, momentum=0.0, workers=2)
  params = {'w': jnp.arange(8.0).reshape(2, 4)}
  apart = jnp.stack([params['w'] + 1, params['w'] - 3])
  settings = config.optimizer.diloco
  assert settings is not None
  state = diloco.DiLoCoState(
    {'w': apart}, {}, {'w': jnp.zeros((2, 4))}, {'w': None}
  )
  theta, state, _ = diloco.step(
    settings, params, state, jnp.zeros((2, 3), jnp.int32), jnp.bool_(True),
    lambda p, s, tokens: (p, s, {}),
  )  # fmt: skip
  np.testing.assert_allclose(theta['w'], params['w'] - 1)
  np.testing.assert_allclose(state.workers['w'][0], theta['w'])


@pytest.mark.parametrize('bits', [2, 4])
def test_levels_are_lloyds_and_what_is_left_out_is_known(bits):
  levels = diloco.normal_levels(2**bits)
  np.testing.assert_allclose(levels, levels_by_integration(2**bits), atol=2e-3)
  # Mean squared errors of Max (1960), table I: 4 and 16 levels.
  x = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
  packed = diloco.quantize(jnp.asarray(x), bits)
  assert packed.codes.nbytes == x.size * bits // 8
  error = np.mean((np.asarray(diloco.dequantize(packed, bits)) - x) ** 2)
  assert error == pytest.approx({2: 0.1175, 4: 0.009497}[bits], rel=0.02)
  np.testing.assert_allclose(
    diloco.dequantize(packed, bits), rounded(x.astype(np.float64), bits),
    atol=1e-5,
  )  # fmt: skip


def test_rows_of_zeros_stay_zero():
  packed = diloco.quantize(jnp.zeros((3, 8)), 2)
  assert not np.asarray(diloco.dequantize(packed, 2)).any()


@pytest.mark.parametrize(
  'settings, words',
  [
    ({'workers': 3}, 'diloco.workers=3 must be a multiple of mesh.data=2'),
    ({'batch_size': 4}, 'batch_size=4 must be a multiple of .*workers=4'),
  ],
)
def test_workers_that_do_not_fit_are_refused(settings, words):
  config = experiment(**settings)
  mesh = mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with pytest.raises(ValueError, match=words):
    step.jitted(config, mesh)


def test_the_last_step_must_be_an_agreement():
  with pytest.raises(ValueError, match='diloco.every=5 must divide run.steps'):
    experiment(every=5)
  with pytest.raises(ValueError, match='diloco.momentum=1'):
    DiLoCoConfig(workers=2, momentum=1.0)
  assert math.isclose(DiLoCoConfig(workers=2).rate, 0.7)


def test_between_agreements_only_metrics_cross_workers():
  """And in one, bytes of codes: those of the other workers, once."""
  config = experiment(bits=2)
  mesh = mesh_lib.make_mesh(MeshConfig(data=4, fsdp=2))
  tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32)
  with jax.set_mesh(mesh):
    state = step.abstract_state(config, mesh)
    compiled = step.jitted(config, mesh).lower(state, tokens, 0).compile()
  # Devices 0 and 1 are worker 0's, 2 and 3 worker 1's.
  crossing = [
    one
    for one in collectives.of(compiled)
    if any(len({device // 2 for device in group}) > 1 for group in one.groups)
  ]
  agreeing = [one for one in crossing if '/cond/' in one.source]
  apart = [one for one in crossing if '/cond/' not in one.source]
  assert sum(one.bytes * one.times for one in apart) < 200
  matrices = [
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    if path[-1].key != 'scale'
  ]
  codes = [one for one in agreeing if one.results[0].dtype == 'u8']
  received = 3 * sum(matrices) // 4 // 2  # four codes a byte, two devices
  assert sum(one.bytes * one.times for one in codes) == received
