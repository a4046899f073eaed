# SPDX-License-Identifier: Apache-2.0
"""SwiGLU, down(silu(gate(x)) * up(x)), or BitNet's form of it."""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from tritera_jax.model import layers
from tritera_jax.model.config import ModelConfig


class MLP(nnx.Module):
  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    self.config = config
    self.gate = layers.linear(config, 'mlp.gate', rngs=rngs)
    self.up = layers.linear(config, 'mlp.up', rngs=rngs)
    self.down = layers.linear(config, 'mlp.down', rngs=rngs)
    if config.sub_norm:
      self.sub_norm = layers.rms_norm(config, config.d_ff, rngs=rngs)

  def __call__(self, x: Float[Array, '*batch D']) -> Float[Array, '*batch D']:
    gate = self.gate(x)
    if self.config.mlp_activation == 'relu2':
      gate = jnp.square(nnx.relu(gate))
    else:
      gate = nnx.silu(gate)
    y = gate * self.up(x)
    return self.down(self.sub_norm(y) if self.config.sub_norm else y)
