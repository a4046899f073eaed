# SPDX-License-Identifier: Apache-2.0
"""What BitNet b1.58's linear layers do to their inputs (arXiv 2402.17764).

Its training code (`microsoft/unilm`, "Training Tips, Code and FAQ"), a token
at a time:

  s = 127 / max(max|x|, 1e-5),   x' = clip(round(x s), -128, 127) / s

with round half to even, after an RMSNorm without gain; straight-through: the
gradient of x' goes to x unchanged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-5  # least absmax of a token


@jax.custom_vjp
def int8_straight_through(
  x: Float[Array, '*batch K'],
) -> Float[Array, '*batch K']:
  """The nearest of each token's 255 levels, in x's dtype."""
  wide = x.astype(jnp.float32)
  peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
  scale = 127.0 / jnp.maximum(peak, EPS)
  return (jnp.clip(jnp.round(wide * scale), -128, 127) / scale).astype(x.dtype)


def _forward(x):
  return int8_straight_through(x), None


def _backward(_, g):
  return (g,)


int8_straight_through.defvjp(_forward, _backward)


def rms_normalized(
  x: Float[Array, '*batch K'], epsilon: float
) -> Float[Array, '*batch K']:
  """x / sqrt(mean x^2 + epsilon), in x's dtype; statistics in float32."""
  wide = x.astype(jnp.float32)
  mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)
