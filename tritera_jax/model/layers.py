# SPDX-License-Identifier: Apache-2.0
"""The parts a block is built from, made to a ModelConfig."""

import math

from flax import nnx
import jax.numpy as jnp

from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.layers import FloatLinear, QuantizedLinear


def linear(config: ModelConfig, name: str, *, rngs: nnx.Rngs) -> FloatLinear:
  """The layer `name` of `config.linears`, in the model's weight family."""
  spec = config.linears[name]
  init_std = config.init_std
  if name in ('attention.o', 'mlp.down'):
    # They add to the residual stream 2 L times.
    init_std /= math.sqrt(2 * config.layers)
  if config.family == 'float':
    layer = FloatLinear(
      spec.in_features,
      spec.out_features,
      axes=spec.axes,
      init_std=init_std,
      rngs=rngs,
    )
  else:
    layer = QuantizedLinear(
      spec.in_features,
      spec.out_features,
      family=config.family,
      scale_blocks=config.scale_blocks,
      scale_axis=spec.scale_axis,
      scale_floor=config.scale_floor,
      axes=spec.axes,
      init_std=init_std,
      rngs=rngs,
    )
  if config.input_norm:
    layer.norm_epsilon = config.norm_eps
  layer.activation_bits = config.activation_bits
  return layer


def rms_norm(
  config: ModelConfig, features: int, *, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  """RMSNorm with a learned gain; statistics in float32."""
  return nnx.RMSNorm(
    features,
    epsilon=config.norm_eps,
    dtype=jnp.dtype(config.dtype),
    scale_metadata={'axes': (None,)},
    rngs=rngs,
  )
