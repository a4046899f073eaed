# SPDX-License-Identifier: Apache-2.0
"""The graph of a decoder's layers, in terms of the fused operations."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float32, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerWeights:
  """One layer: two gains float32 [D], and seven PackedTernary.

  `q_gain` and `k_gain`, float32 [h], are of the norm of each query and key
  head; both None where there is none.
  """

  # Any: as a pytree it may also hold shapes, shardings or tracers.
  attention_norm: Any
  q: Any
  k: Any
  v: Any
  o: Any
  mlp_norm: Any
  gate: Any
  up: Any
  down: Any
  q_gain: Any = None
  k_gain: Any = None

  @property
  def gains(self) -> tuple[Any, Any] | None:
    return None if self.q_gain is None else (self.q_gain, self.k_gain)


def run(
  norm_matmul: Callable,
  attention: Callable,
  matmul_add: Callable,
  swiglu_matmul_add: Callable,
  x_MD: Float32[Array, 'M D'],
  layers: Sequence[LayerWeights],
  caches: Sequence[Any],
  start_B: Int32[Array, ' B'],
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
  activations: str,
) -> tuple[Float32[Array, 'M D'], list[Any]]:
  """The residual stream after every layer, and the caches with T more tokens.

  Layer by layer x += attention(norm(x)), x += mlp(norm(x)); the first four
  arguments compute its parts. Caches and starts are `attention`'s affair.
  """
  updated = []
  for layer, cache in zip(layers, caches, strict=True):
    qkv_MX = norm_matmul(
      x_MD,
      layer.attention_norm,
      (layer.q, layer.k, layer.v),
      epsilon=epsilon,
      activations=activations,
    )
    y_MA, cache = attention(
      qkv_MX,
      layer.gains,
      cache,
      start_B,
      heads=heads,
      kv_heads=kv_heads,
      head_dim=head_dim,
      theta=theta,
      epsilon=epsilon,
    )
    updated.append(cache)
    x_MD = matmul_add(y_MA, layer.o, x_MD, activations=activations)
    gate_up_M2F = norm_matmul(
      x_MD,
      layer.mlp_norm,
      (layer.gate, layer.up),
      epsilon=epsilon,
      activations=activations,
    )
    x_MD = swiglu_matmul_add(
      gate_up_M2F, layer.down, x_MD, activations=activations
    )
  return x_MD, updated
