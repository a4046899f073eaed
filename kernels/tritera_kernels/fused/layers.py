# SPDX-License-Identifier: Apache-2.0
"""The graph of a decoder's layers, in terms of the fused operations."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
  """One layer: gains and PackedTernary.

  Attributes:
    attention_norm: float32 [D].
    qkv: matrices of the queries, keys and values; or one, of all their rows.
    o: matrix of the attention's output.
    mlp_norm: float32 [D].
    gate_up: matrices of gate and up; or one, of all their rows.
    down: matrix of the MLP's output.
    q_gain: of the norm of each query head, float32 [h]; None: there is none.
    k_gain: the same of each key head.
    o_gain: of the norm of what `o` takes, float32 [A]; None: there is none.
    down_gain: the same of what `down` takes, float32 [F].
  """

  # Any: as a pytree it may also hold shapes, shardings or tracers.
  attention_norm: Any
  qkv: tuple[Any, ...]
  o: Any
  mlp_norm: Any
  gate_up: tuple[Any, ...]
  down: Any
  q_gain: Any = None
  k_gain: Any = None
  o_gain: Any = None
  down_gain: Any = None

  @property
  def gains(self) -> tuple[Any, Any] | None:
    return None if self.q_gain is None else (self.q_gain, self.k_gain)


def run(
  norm_matmul: Callable,
  attention: Callable,
  matmul_add: Callable,
  gated_matmul_add: Callable,
  x_MD: Float32[Array, 'M D'],
  layers: Sequence[LayerWeights],
  caches: Sequence[Any],
  start: Any,
  **statics,
) -> tuple[Float32[Array, 'M D'], list[Any]]:
  """The residual stream after every layer, and the caches with T more tokens.

  `_layer` after `_layer`, whose parts the first four arguments compute; they
  are traced once for all layers of one shape, so give the same functions
  again. Caches and `start` are `attention`'s affair. `statics` as of
  `api.decoder_layers`.
  """
  parts = (norm_matmul, attention, matmul_add, gated_matmul_add)
  updated = []
  for layer, cache in zip(layers, caches, strict=True):
    x_MD, cache = _layer(
      parts, tuple(sorted(statics.items())), x_MD, layer, cache, start
    )
    updated.append(cache)
  return x_MD, updated


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(
  parts: tuple[Callable, ...],
  statics: tuple[tuple[str, Any], ...],
  x_MD: Float32[Array, 'M D'],
  layer: LayerWeights,
  cache: Any,
  start: Any,
) -> tuple[Float32[Array, 'M D'], Any]:
  """x += attention(norm(x)), then x += mlp(norm(x))."""
  norm_matmul, attention, matmul_add, gated_matmul_add = parts
  shape = dict(statics)
  gate, activations = shape.pop('gate'), shape.pop('activations')
  epsilon = shape['epsilon']
  qkv_MX = norm_matmul(
    x_MD,
    layer.attention_norm,
    layer.qkv,
    epsilon=epsilon,
    activations=activations,
  )
  y_MA, cache = attention(qkv_MX, layer.gains, cache, start, **shape)
  x_MD = matmul_add(
    y_MA,
    layer.o_gain,
    layer.o,
    x_MD,
    epsilon=epsilon,
    activations=activations,
  )
  gate_up_M2F = norm_matmul(
    x_MD,
    layer.mlp_norm,
    layer.gate_up,
    epsilon=epsilon,
    activations=activations,
  )
  x_MD = gated_matmul_add(
    gate_up_M2F,
    layer.down_gain,
    layer.down,
    x_MD,
    gate=gate,
    epsilon=epsilon,
    activations=activations,
  )
  return x_MD, cache
