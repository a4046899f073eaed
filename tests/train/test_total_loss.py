# SPDX-License-Identifier: Apache-2.0
"""Losses without the logits of all tokens at once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import loss

B, T = 2, 37
CONFIG = ModelConfig(
  family='float', vocab_size=1000, layers=1, d_model=16, d_ff=16, heads=1,
  kv_heads=1, head_dim=16, context_length=T, init_std=0.5,
)  # fmt: skip


@pytest.fixture(scope='module')
def model():
  return decoder.bind(CONFIG, decoder.init(CONFIG, jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=3)
def losses(model, x_BTD, targets_BT, most_logits):
  return loss.over_logits(
    loss.token_losses, model, x_BTD, targets_BT, most_logits=most_logits
  )


@pytest.mark.parametrize('tokens', [1, 5, 36])
def test_chunks_have_the_losses_of_the_whole(model, tokens):
  draw = np.random.default_rng(0)
  x_BTD = draw.normal(size=(B, T, 16)).astype(np.float32)
  targets_BT = draw.integers(0, 1000, (B, T)).astype(np.int32)
  logits = np.float64(model.logits(jnp.array(x_BTD)))
  log_z = np.log(np.exp(logits - logits.max()).sum(-1)) + logits.max()
  target = np.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
  most = tokens * B * CONFIG.padded_vocab_size
  got = losses(model, x_BTD, targets_BT, most)
  np.testing.assert_allclose(got, log_z - target, rtol=2e-5)


def test_chunks_of_a_sequence_that_a_mesh_splits(model):
  B, T = 2, 40
  draw = np.random.default_rng(0)
  x_BTD = draw.normal(size=(B, T, 16)).astype(np.float32)
  targets_BT = draw.integers(0, 1000, (B, T)).astype(np.int32)
  want = losses(model, x_BTD, targets_BT, 2**30)
  config = MeshConfig(data=2, fsdp=1, context=2)
  mesh = mesh_lib.make_mesh(config, jax.devices()[:4])
  with jax.set_mesh(mesh):
    x_BTD, targets_BT = jax.device_put(
      (x_BTD, targets_BT), NamedSharding(mesh, P('data', 'context'))
    )
    got = losses(model, x_BTD, targets_BT, 5 * CONFIG.padded_vocab_size)
  np.testing.assert_allclose(got, want, rtol=2e-6)


def test_a_program_has_room_for_a_chunk_of_logits(model):
  """Bytes that XLA says it takes: those of the vocabulary, not of the text."""
  B, T = 4, 256
  x_BTD = jax.ShapeDtypeStruct((B, T, 16), jnp.float32)
  targets_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
  row = 4 * B * CONFIG.padded_vocab_size  # bytes of a token a row
  took = [
    losses.lower(model, x_BTD, targets_BT, most).compile().memory_analysis()
    .temp_size_in_bytes
    for most in (2**30, 8 * B * CONFIG.padded_vocab_size)
  ]  # fmt: skip
  assert took[0] > T * row
  assert took[1] < 3 * 8 * row
