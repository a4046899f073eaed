# SPDX-License-Identifier: Apache-2.0
"""Training on split sequences is training on whole ones."""

import dataclasses
import functools
import re

import jax
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
  qk_norm=True, document_separator=7, context_length=T,
)  # fmt: skip


def experiment(**run):
  base = test_step.with_run(**{'loss_chunk': 10, **run})
  return dataclasses.replace(
    base,
    model=MODEL,
    data=dataclasses.replace(base.data, sequence_length=T, batch_size=16),
    optimizer=dataclasses.replace(base.optimizer, z_loss=0.01),
  )


def tokens():
  """Sixteen rows with a separator in most: documents of all lengths."""
  rng = np.random.default_rng(0)
  found = rng.integers(0, 100, (16, T + 1)).astype(np.int32)
  return np.where(rng.random(found.shape) < 0.06, 7, found)


def mesh_of(config):
  sizes = config.data, config.fsdp, config.context, config.tensor
  return mesh_lib.make_mesh(config, jax.devices()[: int(np.prod(sizes))])


def measured(config, **run):
  """Metrics and gradient of a batch, and the compiled program."""
  mesh, settings = mesh_of(config), experiment(**run)
  with jax.set_mesh(mesh):
    placed = step.shardings(settings, mesh).params
    arguments = jax.device_put(
      (decoder.init(MODEL, jax.random.key(0)), tokens()),
      (placed, step.batch_sharding(mesh)),
    )
    program = (
      jax.jit(
        lambda params, tokens: step._accumulated(settings, params, tokens),
        out_shardings=(None, placed),
      )
      .lower(*arguments)
      .compile({'xla_backend_optimization_level': 0})  # half the time
    )
    (_, metrics), gradient = program(*arguments)
  return *jax.tree.map(np.asarray, (metrics, gradient)), program


@functools.cache
def of_one_device():
  return measured(MeshConfig(fsdp=1))[:2]


def check(metrics, gradient):
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


@pytest.mark.parametrize(('config', 'run'), [
  (MeshConfig(fsdp=1, context=2, tensor=2), {'remat': 'dots'}),
  (MeshConfig(fsdp=1, context=8), {'loss_chunk': 0}),
], ids=['two', 'eight'])  # fmt: skip
def test_loss_and_gradients_are_those_of_one_device(config, run):
  check(*measured(config, **run)[:2])


def test_nor_does_any_device_have_a_whole_sequence():
  """Rows and sequences split at once are where XLA would gather them."""
  *found, program = measured(MeshConfig(fsdp=2, context=4))
  check(*found)
  shapes = [
    [int(n) for n in shape.split(',')]
    for shape in re.findall(r'\bf32\[([\d,]+)\]', program.as_text())
  ]
  # A device has 8 rows of T / 4 tokens; no other size is T, or 8 rows of T.
  assert any(2 * T in shape or T // 4 in shape for shape in shapes)
  assert not [shape for shape in shapes if T in shape or 8 * T in shape]


def test_parameters_lie_over_the_devices_of_a_sequence_too():
  mesh = mesh_of(MeshConfig(fsdp=2, context=4))
  state = step.abstract_state(experiment(), mesh)
  kernel = state.params['layers']['mlp']['up']['kernel']
  assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // 8, 64)


def test_held_out_loss_is_that_of_one_device():
  params = decoder.init(MODEL, jax.random.key(0))
  model = decoder.bind(MODEL, params)
  rows = tokens()[:5]  # three short of two batches
  windows = rows[:, :-1], rows[:, 1:], (rows[:, 1:] % 3 > 0).astype(np.float32)
  want = loss.total_loss(model, windows, 4)
  with jax.set_mesh(mesh_of(MeshConfig(data=2, fsdp=1, context=2))):
    got = loss.total_loss(model, windows, 4)
  assert got == pytest.approx(want, rel=1e-6)


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


def test_cudnns_attention_takes_whole_sequences_in_bfloat16():
  config = experiment()
  run = dataclasses.replace(config.run, attention='cudnn')
  with pytest.raises(ValueError, match="'cudnn' takes bfloat16, and model.dty"):
    dataclasses.replace(config, run=run)
  model = dataclasses.replace(config.model, dtype='bfloat16')
  config = dataclasses.replace(config, run=run, model=model)
  step.check_batch(config, dict.fromkeys(mesh_lib.AXES, 1))
  with pytest.raises(ValueError, match=r'whole sequences, and mesh\.context=2'):
    step.check_batch(config, dict.fromkeys(mesh_lib.AXES, 1) | {'context': 2})
