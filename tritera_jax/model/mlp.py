# SPDX-License-Identifier: Apache-2.0
"""SwiGLU: down(silu(gate(x)) * up(x))."""

from flax import nnx
from jaxtyping import Array, Float

from tritera_jax.model import layers
from tritera_jax.model.config import ModelConfig


class MLP(nnx.Module):
  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.gate = layers.linear(config, 'mlp.gate', rngs=rngs)
    self.up = layers.linear(config, 'mlp.up', rngs=rngs)
    self.down = layers.linear(config, 'mlp.down', rngs=rngs)

  def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch D']:
    return self.down(nnx.silu(self.gate(x)) * self.up(x))
