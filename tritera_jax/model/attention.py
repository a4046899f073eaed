# SPDX-License-Identifier: Apache-2.0
"""Causal attention with rotary positions, grouped queries and a KV cache.

Shapes: B batch, T tokens, S cache slots, D width, H query heads, G key/value
heads, h head width.
"""

from typing import Literal, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from tritera_jax.model import layers, ring
from tritera_jax.model.config import ModelConfig
from tritera_jax.parallel import zigzag

# Of whole sequences: XLA's keeps T x T scores, cuDNN's, for GPUs, none.
Kernel = Literal['xla', 'cudnn']


class KVCache(NamedTuple):
  """Keys (after RoPE) and values of the positions seen so far."""

  k_BSGh: Float[Array, '*L B S G h']
  v_BSGh: Float[Array, '*L B S G h']


def rotate(
  x_BTHh: Float[Array, 'B T H h'],
  positions_BT: Int32[Array, 'B T'],
  theta: float,
) -> Float[Array, 'B T H h']:
  """RoPE over the whole head, channels i and i + h/2 paired (as Llama in HF).

  Angles are float32: bfloat16 cannot tell positions past 256 apart.
  """
  half = x_BTHh.shape[-1] // 2
  frequency_f = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle_BTf = positions_BT[..., None].astype(jnp.float32) * frequency_f
  cos, sin = jnp.cos(angle_BTf)[:, :, None], jnp.sin(angle_BTf)[:, :, None]
  a, b = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return turned.astype(x_BTHh.dtype)


class Attention(nnx.Module):
  """softmax(q k^T / sqrt(h)) v between the q, k, v and o projections."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.implementation: Kernel = 'xla'
    self.q = layers.linear(config, 'attention.q', rngs=rngs)
    self.k = layers.linear(config, 'attention.k', rngs=rngs)
    self.v = layers.linear(config, 'attention.v', rngs=rngs)
    self.o = layers.linear(config, 'attention.o', rngs=rngs)
    if config.qk_norm:
      self.q_norm = layers.rms_norm(config, config.head_dim, rngs=rngs)
      self.k_norm = layers.rms_norm(config, config.head_dim, rngs=rngs)
    if config.sub_norm:
      width = config.heads * config.head_dim
      self.sub_norm = layers.rms_norm(config, width, rngs=rngs)

  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    positions_BT: Int32[Array, 'B T'],
    cache: KVCache | None = None,
    documents_BT: Int32[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
    """Attends to earlier positions of the sequence, or of the cache.

    Without a cache, and with `documents_BT`, to those of the same number.
    If several devices share a sequence, its tokens come as `zigzag.arrange`
    has them. With a cache the T keys and values are written at each row's
    `positions_BT[:, 0]` onwards, and a query sees every slot up to its own
    position: slots past it may hold anything.
    """
    config = self.config
    B, T, _ = x_BTD.shape
    q_BTHh = self.q(x_BTD).reshape(B, T, config.heads, config.head_dim)
    k_BTGh = self.k(x_BTD).reshape(B, T, config.kv_heads, config.head_dim)
    v_BTGh = self.v(x_BTD).reshape(B, T, config.kv_heads, config.head_dim)
    if config.qk_norm:
      q_BTHh, k_BTGh = self.q_norm(q_BTHh), self.k_norm(k_BTGh)
    q_BTHh = rotate(q_BTHh, positions_BT, config.rope_theta)
    k_BTGh = rotate(k_BTGh, positions_BT, config.rope_theta)

    if cache is None and zigzag.devices() > 1:
      y_BTHh = ring.attention(q_BTHh, k_BTGh, v_BTGh, documents_BT)
    elif cache is None:
      same_B1TT = None
      if documents_BT is not None:
        same_B1TT = (documents_BT[:, :, None] == documents_BT[:, None])[:, None]
      y_BTHh = jax.nn.dot_product_attention(
        q_BTHh,
        k_BTGh,
        v_BTGh,
        mask=same_B1TT,
        is_causal=True,
        implementation=self.implementation,
      )
    else:
      write = jax.vmap(
        lambda slots, new, start: jax.lax.dynamic_update_slice_in_dim(
          slots, new.astype(slots.dtype), start, axis=0
        )
      )
      start_B = positions_BT[:, 0]
      cache = KVCache(
        write(cache.k_BSGh, k_BTGh, start_B),
        write(cache.v_BSGh, v_BTGh, start_B),
      )
      slot_S = jnp.arange(cache.k_BSGh.shape[1])
      visible_B1TS = (slot_S <= positions_BT[..., None])[:, None]
      y_BTHh = jax.nn.dot_product_attention(
        q_BTHh,
        cache.k_BSGh.astype(q_BTHh.dtype),
        cache.v_BSGh.astype(q_BTHh.dtype),
        mask=visible_B1TS,
      )
    y_BTX = y_BTHh.reshape(B, T, -1)
    return self.o(self.sub_norm(y_BTX) if config.sub_norm else y_BTX), cache
