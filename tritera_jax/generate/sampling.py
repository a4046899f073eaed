# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Filters apply in the order temperature, top-k, top-p.

  Attributes:
    temperature: divides the logits; 0 is greedy (the most likely token).
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability
      reaches p; 1 keeps all.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be >= 0')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must be >= 0 (0 keeps all)')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1]')


def filtered_logits(
  sampling: Sampling, logits_BV: Float32[Array, 'B V']
) -> Float32[Array, 'B V']:
  """Logits of the distribution that is sampled; -inf for dropped tokens."""
  logits_BV = logits_BV / sampling.temperature
  if 0 < sampling.top_k < logits_BV.shape[-1]:
    kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    p_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays if those before it do not reach p: the first always does.
    kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p
    least_B1 = jnp.min(
      jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample(
  sampling: Sampling,
  key_B: Key[Array, ' B'],
  logits_BV: Float32[Array, 'B V'],
) -> Int32[Array, ' B']:
  """One token a row, each drawn with its own key."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = filtered_logits(sampling, logits_BV)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
