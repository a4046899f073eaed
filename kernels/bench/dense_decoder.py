# SPDX-License-Identifier: Apache-2.0
"""The dense twin of a packed model: bfloat16 weights, else the same program.

Joined matrices, one leaf for each, attention by the same kernel, the same
loop: what differs in time is the multiplication.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tritera_jax.model.config import ModelConfig
from tritera_kernels import fused
from tritera_kernels.fused import CacheType, LayerWeights, layers, reference


def _multiply(x_MK, w_NK):
  return jax.lax.dot_general(
    x_MK.astype(jnp.bfloat16),
    w_NK,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _norm_matmul(x_MD, gain_D, matrices, *, epsilon, activations):
  del activations
  [w_ND] = matrices
  return _multiply(reference.rms_norm(x_MD, gain_D, epsilon), w_ND)


def _matmul_add(x_MK, gain_K, w_NK, residual_MN, *, epsilon, activations):
  del activations
  if gain_K is not None:
    x_MK = reference.rms_norm(x_MK, gain_K, epsilon)
  return residual_MN + _multiply(x_MK, w_NK)


def _gated_matmul_add(gate_up_M2F, gain_F, w_NF, residual_MN, *, gate, **rest):
  gate_MF, up_MF = jnp.split(gate_up_M2F, 2, axis=1)
  x_MF = reference.GATES[gate](gate_MF) * up_MF
  return _matmul_add(x_MF, gain_F, w_NF, residual_MN, **rest)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseDecoder:
  """A LanguageModel of bfloat16 matrices [N, K]; fields as of PackedDecoder."""

  embed: Any
  layers: Any
  norm: Any
  head: Any
  config: ModelConfig = dataclasses.field(metadata={'static': True})
  cache: CacheType = dataclasses.field(metadata={'static': True})

  def __call__(self, tokens_BT, positions_BT=None, cache=None):
    x_BTD, cache = self.hidden(tokens_BT, positions_BT, cache)
    return self.logits(x_BTD), cache

  def hidden(self, tokens_BT, positions_BT=None, cache=None):
    B, T = tokens_BT.shape
    config = self.config
    x_BTD = self.embed[tokens_BT].astype(jnp.float32)
    start_B = jnp.zeros((B,), jnp.int32)
    if positions_BT is not None:
      start_B = positions_BT[:, 0]
    x_MD, cache = layers.run(
      _norm_matmul,
      fused.attention,
      _matmul_add,
      _gated_matmul_add,
      x_BTD.reshape(B * T, -1),
      self.layers,
      self.empty_cache(B, T) if cache is None else cache,
      start_B,
      heads=config.heads,
      kv_heads=config.kv_heads,
      head_dim=config.head_dim,
      theta=config.rope_theta,
      epsilon=config.norm_eps,
      gate=config.mlp_activation,
      activations='bfloat16',
    )
    return x_MD.reshape(x_BTD.shape), cache

  def logits(self, x_BTD):
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    x_MD = reference.rms_norm(x_MD, self.norm, self.config.norm_eps)
    return _multiply(x_MD, self.head).reshape(*x_BTD.shape[:-1], -1)

  def empty_cache(self, rows: int, slots: int):
    config = self.config
    return [
      fused.empty_cache(
        rows, config.kv_heads, config.head_dim, slots, self.cache
      )
      for _ in range(config.layers)
    ]


def random_dense_model(
  config: ModelConfig, cache: CacheType = 'bfloat16', seed: int = 0
) -> DenseDecoder:
  """Of normal weights, made on the device; scales as of the packed one."""
  key = jax.random.key(seed)
  drawn = 0

  def matrix(N: int, K: int):
    nonlocal drawn
    drawn += 1
    now = jax.random.fold_in(key, drawn)
    return jax.random.normal(now, (N, K), jnp.bfloat16) / math.sqrt(K)

  D, F = config.d_model, config.d_ff
  A = config.heads * config.head_dim
  X = A + 2 * config.kv_heads * config.head_dim
  gain = lambda width=D: jnp.ones((width,), jnp.float32)
  return DenseDecoder(
    embed=matrix(config.padded_vocab_size, D),
    layers=[
      LayerWeights(
        attention_norm=gain(),
        qkv=(matrix(X, D),),
        o=matrix(D, A),
        mlp_norm=gain(),
        gate_up=(matrix(2 * F, D),),
        down=matrix(D, F),
        o_gain=gain(A) if config.sub_norm else None,
        down_gain=gain(F) if config.sub_norm else None,
      )
      for _ in range(config.layers)
    ],
    norm=gain(),
    head=matrix(config.padded_vocab_size, D),
    config=config,
    cache=cache,
  )
