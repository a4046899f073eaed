# SPDX-License-Identifier: Apache-2.0
"""The decoder-only transformer of Spectra (arXiv 2407.12327, Table 3).

Parameters are a plain nested dict of float32 arrays; a block's leaves carry
a leading layer axis, over which the forward pass scans:

  {'embed': {'embedding'}, 'layers': {'attention': {'q': {'kernel'}, ...},
   'mlp': ..., ...}, 'norm': {'scale'}, 'head': {'kernel'}}

Shapes: B batch, T tokens, D width, V padded vocabulary, L layers.
"""

import functools
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray, PyTree

from tritera_jax.model import layers, ring
from tritera_jax.model.attention import Attention, Kernel, KVCache
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.mlp import MLP
from tritera_jax.parallel import gather as gather_lib
from tritera_jax.parallel import rules, zigzag
from tritera_jax.parallel.gather import Gather
from tritera_jax.ternary.layers import FloatLinear

type Params = PyTree[Float[Array, '...']]
Remat = Literal['none', 'dots', 'block']

_policies = jax.checkpoint_policies
_SAVED = {
  # Nor does it send keys and values round twice.
  'dots': _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable,
    _policies.save_only_these_names(ring.SAVED),
  ),
  'block': _policies.nothing_saveable,
}


class Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  With config.input_norm, the norms are those of the linear layers.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.normed = not config.input_norm
    if self.normed:
      self.attention_norm = layers.rms_norm(config, config.d_model, rngs=rngs)
    self.attention = Attention(config, rngs=rngs)
    if self.normed:
      self.mlp_norm = layers.rms_norm(config, config.d_model, rngs=rngs)
    self.mlp = MLP(config, rngs=rngs)

  def __call__(
    self,
    x_BTD: Float[Array, 'B T D'],
    positions_BT: Int32[Array, 'B T'],
    cache: KVCache | None = None,
    documents_BT: Int32[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
    # Without this the partitioner may split the width over the mesh.
    tokens = ('batch', 'sequence' if cache is None else None)
    x_BTD = rules.constrain(x_BTD, (*tokens, None))
    y_BTD = self.attention_norm(x_BTD) if self.normed else x_BTD
    y_BTD, cache = self.attention(y_BTD, positions_BT, cache, documents_BT)
    x_BTD = x_BTD + y_BTD
    y_BTD = self.mlp_norm(x_BTD) if self.normed else x_BTD
    return x_BTD + self.mlp(y_BTD), cache

  def prepare(self, gather: Gather, kernel: Kernel):
    """Says how devices make the block's matrices whole, and what attends."""
    self.attention.implementation = kernel
    for _, module in nnx.iter_modules(self):
      if isinstance(module, FloatLinear):
        module.exchange = gather_lib.exchange(gather, module.axes)


class Decoder(nnx.Module):
  """Token ids to logits. `layers` is one Block, stacked over layers."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.embed = nnx.Embed(
      config.padded_vocab_size,
      config.d_model,
      dtype=jnp.dtype(config.dtype),
      embedding_init=nnx.initializers.normal(config.init_std),
      embedding_metadata={'axes': ('vocab', 'embed')},
      rngs=rngs,
    )
    keys = jax.random.split(rngs.params(), config.layers)
    self.layers: Block = nnx.vmap(
      lambda key: Block(config, rngs=nnx.Rngs(params=key))
    )(keys)
    self.norm = layers.rms_norm(config, config.d_model, rngs=rngs)
    self.head = FloatLinear(
      config.d_model,
      config.padded_vocab_size,
      axes=('embed', 'vocab'),
      init_std=config.init_std,
      rngs=rngs,
    )

  def __call__(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: KVCache | None = None,
    *,
    remat: Remat = 'none',
  ) -> tuple[Float32[Array, 'B T V'], KVCache | None]:
    """Logits over the padded vocabulary, and the cache with T more positions.

    Args:
      tokens_BT: ids below the vocabulary's size.
      positions_BT: default: 0..T-1, or from 0 in each document, if the config
        has a document_separator. Documents are told apart in whole sequences
        alone: a row that comes with a cache is one document.
      cache: with leading axis L, or None.
      remat: what the backward pass of a scanned block computes again:
        'none', 'dots' (all but matmuls' results) or 'block' (everything).
    """
    x_BTD, cache = self.hidden(tokens_BT, positions_BT, cache, remat=remat)
    return self.logits(x_BTD), cache

  def hidden(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: KVCache | None = None,
    *,
    remat: Remat = 'none',
    gather: Gather = 'auto',
    attention: Kernel = 'xla',
  ) -> tuple[Float[Array, 'B T D'], KVCache | None]:
    """The residual stream past the last block; arguments as of a call.

    Without a cache, sequences are split over a mesh's `context` axis. `gather`:
    how devices that share the blocks' matrices make them whole. `attention`:
    what computes it without a cache, where no devices share a sequence.
    """
    documents_BT = None
    if cache is None:
      documents_BT = documents(self.config, tokens_BT)
    if positions_BT is None:
      positions_BT = positions(tokens_BT, documents_BT)
    arrays_BT = tokens_BT, positions_BT, documents_BT
    if cache is None:
      arrays_BT = zigzag.arrange(arrays_BT)
    arranged_BT, places_BT, documents_BT = arrays_BT
    graphdef, stacked = nnx.split(self.layers)

    def body(x_BTD, layer):
      params, cache = layer
      block = nnx.merge(graphdef, params)
      block.prepare(gather, attention)
      return block(x_BTD, places_BT, cache, documents_BT)

    if remat != 'none':
      body = jax.checkpoint(body, policy=_SAVED[remat], prevent_cse=False)
    x_BTD = self._embedded(arranged_BT)
    x_BTD, after = jax.lax.scan(body, x_BTD, (stacked, cache))
    return x_BTD if cache is not None else zigzag.restore(x_BTD), after

  def _embedded(self, tokens_BT) -> Float[Array, 'B T D']:
    if zigzag.devices() == 1:
      return self.embed(tokens_BT)
    # Whole rows of the table: else XLA looks up each device's columns of every
    # token of the batch.
    table_VD = rules.constrain(self.embed.embedding[...], ('vocab', None))
    table_VD = table_VD.astype(jnp.dtype(self.config.dtype))
    return jnp.take(table_VD, tokens_BT, axis=0)

  def logits(
    self, x_BTD: Float[Array, '*batch D']
  ) -> Float32[Array, '*batch V']:
    """Logits over the padded vocabulary of what `hidden` returned."""
    return self.head(self.norm(x_BTD)).astype(jnp.float32)

  def empty_cache(self, rows: int, slots: int) -> KVCache:
    """A cache for that many rows and positions, in the compute dtype."""
    config = self.config
    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    zeros = lambda: jnp.zeros(shape, jnp.dtype(config.dtype))
    return KVCache(zeros(), zeros())


def documents(
  config: ModelConfig, tokens_BT: Int32[Array, 'B T']
) -> Int32[Array, 'B T'] | None:
  """The number of each token's document, if the model tells them apart."""
  if config.document_separator is None:
    return None
  return jnp.cumsum(
    tokens_BT == config.document_separator, axis=1, dtype=jnp.int32
  )


def positions(
  tokens_BT: Int32[Array, 'B T'], documents_BT: Int32[Array, 'B T'] | None
) -> Int32[Array, 'B T']:
  """From 0 in each row, or in each document."""
  position_BT = jnp.broadcast_to(
    jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
  )
  if documents_BT is None:
    return position_BT
  starts_BT = jnp.diff(documents_BT, axis=1, prepend=documents_BT[:, :1])
  return position_BT - jax.lax.cummax(
    jnp.where(starts_BT > 0, position_BT, 0), axis=1
  )


@functools.lru_cache
def _abstract(config: ModelConfig):
  return nnx.split(
    nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
  )


def init(config: ModelConfig, key: PRNGKeyArray) -> Params:
  """Fresh parameters; a pure function of (config, key)."""
  model = Decoder(config, rngs=nnx.Rngs(params=key))
  return nnx.to_pure_dict(nnx.state(model))


def bind(config: ModelConfig, params: Params) -> Decoder:
  """The module that computes with `params`, whatever holds them."""
  graphdef, state = _abstract(config)
  state = jax.tree.map(lambda leaf: leaf, state)  # a copy to fill
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)


def abstract_params(config: ModelConfig) -> PyTree[jax.ShapeDtypeStruct]:
  """Shapes and dtypes of the parameters, without making them."""
  return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> PyTree[tuple[str | None, ...]]:
  """The logical axis of each dimension of each parameter."""
  _, state = _abstract(config)

  def names(variable):
    axes = variable.get_metadata()['axes']
    stacked = len(variable.shape) - len(axes)
    return ('layers',) * stacked + tuple(axes)

  axes = jax.tree.map(
    names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
  )
  return nnx.to_pure_dict(axes)
