# SPDX-License-Identifier: Apache-2.0
"""Training on split sequences is training on whole ones."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_decoder import TINY
from tests.train import test_step
from tritera_jax.model import decoder
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import loss, step

T = 48
MODEL = dataclasses.replace(
  TINY, d_model=32, d_ff=64, heads=8, kv_heads=4, head_dim=8, init_std=0.1,
  qk_norm=True, document_separator=7, context_length=T, layers=2,
)  # fmt: skip


def experiment(**run):
  base = test_step.with_run(**{'loss_chunk': 10, **run})
  return dataclasses.replace(
    base,
    model=MODEL,
    data=dataclasses.replace(base.data, sequence_length=T),
    optimizer=dataclasses.replace(base.optimizer, z_loss=0.01),
  )


def tokens():
  """Eight rows with a separator in most: documents of all lengths."""
  rng = np.random.default_rng(0)
  found = rng.integers(0, 100, (8, T + 1)).astype(np.int32)
  return np.where(rng.random(found.shape) < 0.06, 7, found)


def mesh_of(config):
  sizes = config.data, config.fsdp, config.context, config.tensor
  return mesh_lib.make_mesh(config, jax.devices()[: int(np.prod(sizes))])


def measured(mesh, **run):
  """Metrics and gradient of a batch, its parameters where they are kept."""
  config = experiment(**run)
  with jax.set_mesh(mesh):
    placed = step.shardings(config, mesh).params
    compute = jax.jit(
      lambda params, tokens: step._accumulated(config, params, tokens),
      in_shardings=(placed, step.batch_sharding(mesh)),
      out_shardings=(None, placed),
    )
    params = jax.device_put(decoder.init(MODEL, jax.random.key(0)), placed)
    (_, metrics), gradient = compute(params, tokens())
  return jax.tree.map(np.asarray, (metrics, gradient))


@functools.cache
def of_one_device():
  return measured(mesh_of(MeshConfig(fsdp=1)))


@pytest.mark.parametrize(('config', 'run'), [
  (MeshConfig(fsdp=1, context=2), {'loss_chunk': 0}),
  (MeshConfig(fsdp=2, context=2), {'accumulation': 2}),
  (MeshConfig(fsdp=1, context=8), {}),
  (MeshConfig(fsdp=2, context=2, tensor=2), {'remat': 'dots'}),
], ids=['two', 'four', 'eight', 'all'])  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(config, run):
  metrics, gradient = measured(mesh_of(config), **run)
  want_metrics, want = of_one_device()
  for name in ('loss', 'z_loss'):
    assert metrics[name] == pytest.approx(want_metrics[name], rel=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * np.abs(b).max()
    ),
    gradient,
    want,
  )


def test_held_out_loss_is_that_of_one_device():
  params = decoder.init(MODEL, jax.random.key(0))
  model = decoder.bind(MODEL, params)
  rows = tokens()[:5]  # three short of two batches
  windows = rows[:, :-1], rows[:, 1:], (rows[:, 1:] % 3 > 0).astype(np.float32)
  want = loss.total_loss(model, windows, 4)
  with jax.set_mesh(mesh_of(MeshConfig(data=2, fsdp=2, context=2))):
    got = loss.total_loss(model, windows, 4)
  assert got == pytest.approx(want, rel=1e-6)


def test_no_device_ever_has_the_whole_of_a_sequence():
  """Rows and sequences split at once are where XLA would gather them."""
  mesh = mesh_of(MeshConfig(fsdp=2, context=4))
  config = experiment()
  B = 16
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=B)
  )
  with jax.set_mesh(mesh):
    state = step.abstract_state(config, mesh)
    batch = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)
    program = step.jitted(config, mesh).lower(state, batch, 0).compile()
  kernel = state.params['layers']['mlp']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // 8, 64)
  text = program.as_text()
  shapes = [
    [int(n) for n in shape.split(',')]
    for shape in re.findall(r'\bf32\[([\d,]+)\]', text)
  ]
  # A device has 8 rows of T / 4 tokens; no other size is T, or 8 rows of T.
  assert any(2 * T in shape for shape in shapes)
  assert not [shape for shape in shapes if T in shape or 8 * T in shape]


@pytest.mark.parametrize(('sizes', 'fields', 'words'), [
  ({'context': 5}, {}, r'data\.sequence_length=48 .* 2 x mesh\.context=5'),
  ({'context': 2, 'tensor': 4}, {'kv_heads': 2},
   r'model\.kv_heads=2 must be a multiple of mesh\.tensor=4'),
  ({'context': 6, 'fsdp': 2}, {'d_model': 32},
   r'model\.d_model=32 must be a multiple of mesh\.fsdp=2 x mesh\.context=6'),
])  # fmt: skip
def test_what_a_mesh_cannot_divide_is_refused(sizes, fields, words):
  config = experiment()
  T = 48 if sizes['context'] != 6 else 24
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(MODEL, **fields),
    data=dataclasses.replace(config.data, sequence_length=T),
  )
  sizes = dict.fromkeys(mesh_lib.AXES, 1) | sizes
  with pytest.raises(ValueError, match=words):
    step.check_batch(config, sizes)
