# SPDX-License-Identifier: Apache-2.0
"""A decoder that computes with packed codes, by the fused operations.

Shapes: B rows, T tokens, M = B T; D width, V padded vocabulary, X width of
queries, keys and values together.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from tritera_jax.checkpoint import packed_file
from tritera_jax.checkpoint.packed_file import PackedModel
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_kernels import byte_matrix, fused
from tritera_kernels import packed as packed_lib
from tritera_kernels.byte_matrix import ByteMatrix
from tritera_kernels.fused import CacheType, KVCache, LayerWeights, reference
from tritera_kernels.fused import layers as layers_lib
from tritera_kernels.matmul import Activations
from tritera_kernels.packed import PackedTernary


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedDecoder:
  """Token ids to logits, in float32: called as a `Decoder` is.

  One leaf for each layer and matrix: a scanned slice of a stack that feeds a
  custom call would be copied first, at more than the call's cost.

  Attributes:
    embed: ByteMatrix, or float32 [V, D].
    layers: a LayerWeights for each layer.
    norm: float32 [D].
    head: ByteMatrix of V rows, or float32 [D, V].
    config: of the model.
    activations: of the layers' matmuls; a ByteMatrix takes int8 whatever it
      is.
    cache: what keys and values are rounded to.
  """

  embed: Any
  layers: Any
  norm: Any
  head: Any
  config: ModelConfig = dataclasses.field(metadata={'static': True})
  activations: Activations = dataclasses.field(metadata={'static': True})
  cache: CacheType = dataclasses.field(metadata={'static': True})

  def __call__(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: list[KVCache] | None = None,
  ) -> tuple[Float32[Array, 'B T V'], list[KVCache] | None]:
    """Logits over the padded vocabulary, and the cache with T more positions.

    Args:
      tokens_BT: ids below the vocabulary's size.
      positions_BT: as `Decoder` has them. With a cache, a row's first one
        counts, and the others are taken to follow it.
      cache: from `empty_cache`. Without it, keys and values are rounded as
        with one; but where the config has a document_separator, or positions
        are given, attention is `jax.nn`'s and rounds nothing.
    """
    x_BTD, cache = self.hidden(tokens_BT, positions_BT, cache)
    return self.logits(x_BTD), cache

  def hidden(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: list[KVCache] | None = None,
  ) -> tuple[Float32[Array, 'B T D'], list[KVCache] | None]:
    """The residual stream past the last layer; arguments as of a call."""
    B, T = tokens_BT.shape
    config = self.config
    if isinstance(self.embed, ByteMatrix):
      x_BTD = byte_matrix.rows(self.embed, tokens_BT)
    else:
      x_BTD = self.embed[tokens_BT]
    x_MD = x_BTD.reshape(B * T, -1)
    statics = {
      'heads': config.heads,
      'kv_heads': config.kv_heads,
      'head_dim': config.head_dim,
      'theta': config.rope_theta,
      'epsilon': config.norm_eps,
      'gate': config.mlp_activation,
      'activations': self.activations,
    }
    start_B = jnp.zeros((B,), jnp.int32)
    if cache is not None:
      if positions_BT is not None:
        start_B = positions_BT[:, 0]
      x_MD, cache = fused.decoder_layers(
        x_MD, self.layers, cache, start_B, **statics
      )
    elif positions_BT is None and config.document_separator is None:
      x_MD, _ = fused.decoder_layers(
        x_MD, self.layers, self.empty_cache(B, T), start_B, **statics
      )
    else:
      documents_BT = decoder.documents(config, tokens_BT)
      if positions_BT is None:
        positions_BT = decoder.positions(tokens_BT, documents_BT)
      x_MD, _ = layers_lib.run(
        fused.norm_matmul,
        _attention_of_documents,
        fused.matmul_add,
        fused.gated_matmul_add,
        x_MD,
        self.layers,
        [None] * config.layers,
        (positions_BT, documents_BT),
        **statics,
      )
    return x_MD.reshape(x_BTD.shape), cache

  def logits(
    self, x_BTD: Float32[Array, '*batch D']
  ) -> Float32[Array, '*batch V']:
    """Logits over the padded vocabulary of what `hidden` returned."""
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    epsilon = self.config.norm_eps
    if isinstance(self.head, ByteMatrix):
      y_MV = fused.norm_matmul(
        x_MD, self.norm, self.head, epsilon=epsilon, activations='int8'
      )
    else:
      # Accelerators would round float32 to fewer bits if nothing is said.
      y_MV = jnp.matmul(
        reference.rms_norm(x_MD, self.norm, epsilon),
        self.head,
        precision=jax.lax.Precision.HIGHEST,
      )
    return y_MV.reshape(*x_BTD.shape[:-1], -1)

  def empty_cache(self, rows: int, slots: int) -> list[KVCache]:
    """A cache for that many rows and positions."""
    config = self.config
    return [
      fused.empty_cache(
        rows, config.kv_heads, config.head_dim, slots, self.cache
      )
      for _ in range(config.layers)
    ]


def _attention_of_documents(qkv_MX, gains, cache, places, **statics):
  """In the place of `fused.attention`: within documents, without a cache."""
  positions_BT, documents_BT = places
  q_BTHh, k_BTGh, v_BTGh = reference.split_heads(
    qkv_MX.reshape(*positions_BT.shape, -1), gains, positions_BT, **statics
  )
  same_B1TT = None
  if documents_BT is not None:
    same_B1TT = (documents_BT[:, :, None] == documents_BT[:, None])[:, None]
  y_BTHh = jax.nn.dot_product_attention(
    q_BTHh, k_BTGh, v_BTGh, mask=same_B1TT, is_causal=True
  )
  return y_BTHh.reshape(len(qkv_MX), -1), cache


_joined = jax.jit(packed_lib.join_rows)
_repacked = jax.jit(packed_lib.repack, static_argnums=1)


def _in_format(matrix: PackedTernary, format: str | None) -> PackedTernary:
  # Bytes that may stay are not copied: they lie in an arena.
  if format in (None, matrix.format):
    return matrix
  return _repacked(matrix, format)


def bind(
  model: PackedModel,
  activations: Activations | None = None,
  cache: CacheType | None = None,
  *,
  join: bool | None = None,
  format: str | None = None,
) -> PackedDecoder:
  """The decoder that computes with a packed model.

  Args:
    model: from `pack.pack_model` or `packed_file.read`.
    activations: default: the packed model's own record.
    cache: default: 'bfloat16'.
    join: copies q, k and v into one matrix, and gate and up into another,
      which take one launch each. Default: unless the weights lie on a CPU,
      where a layer is one call as it is.
    format: what the matrices are repacked to, 'two_bit' or 'base_three', as
      the former takes less work and the latter less memory; default: none.

  Raises:
    ValueError: the model was trained with other activations.
  """
  activations = activations or model.activations
  packed_file.check_expressible(model.config, activations)
  named = {**model.matrices, **model.rest}
  if join is None:
    join = any(d.platform != 'cpu' for d in named['norm'].devices())

  def layer(i: int) -> LayerWeights:
    matrix = lambda name: _in_format(named[f'layers.{i}.{name}'], format)
    gain = lambda name: named.get(f'layers.{i}.{name}')
    side_by_side = lambda *names: (
      (_joined([matrix(name) for name in names]),)
      if join
      else tuple(matrix(name) for name in names)
    )
    return LayerWeights(
      attention_norm=gain('attention_norm'),
      qkv=side_by_side('attention.q', 'attention.k', 'attention.v'),
      o=matrix('attention.o'),
      mlp_norm=gain('mlp_norm'),
      gate_up=side_by_side('mlp.gate', 'mlp.up'),
      down=matrix('mlp.down'),
      q_gain=gain('attention.q_norm'),
      k_gain=gain('attention.k_norm'),
      o_gain=gain('attention.sub_norm'),
      down_gain=gain('mlp.sub_norm'),
    )

  return PackedDecoder(
    embed=named['embed'],
    layers=[layer(i) for i in range(model.config.layers)],
    norm=named['norm'],
    head=named['head'],
    config=model.config,
    activations=activations,
    cache=cache or 'bfloat16',
  )
