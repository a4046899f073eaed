# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Applied in the order repetition penalty, temperature, top-k, top-p, min-p.

  Attributes:
    temperature: divides the logits; 0 is greedy (the most likely token).
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability
      reaches p; 1 keeps all.
    min_p: keep tokens whose probability is at least min_p times the largest
      (arXiv 2407.01082); 0 keeps all.
    repetition_penalty: a token already in the prompt or the continuation has
      its logit divided by this if positive, multiplied if negative (CTRL,
      arXiv 1909.05858); 1 is off. It holds for greedy too.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be >= 0')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must be >= 0 (0 keeps all)')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1]')
    if not 0 <= self.min_p <= 1:
      raise ValueError(f'min_p={self.min_p} must lie in [0, 1] (0 keeps all)')
    if not 0 < self.repetition_penalty < float('inf'):
      raise ValueError(
        f'repetition_penalty={self.repetition_penalty} must be > 0 (1 is off)'
      )


def penalized_logits(
  sampling: Sampling,
  logits_BV: Float32[Array, 'B V'],
  seen_BV: Bool[Array, 'B V'],
) -> Float32[Array, 'B V']:
  """Logits with those of the tokens in `seen_BV` made less likely."""
  penalty = sampling.repetition_penalty
  lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(seen_BV, lower_BV, logits_BV)


def filtered_logits(
  sampling: Sampling, logits_BV: Float32[Array, 'B V']
) -> Float32[Array, 'B V']:
  """Logits divided by the temperature (> 0); -inf for dropped tokens."""
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
  if sampling.min_p > 0:
    # The ratio of two probabilities is the difference of their logits.
    least_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + math.log(
      sampling.min_p
    )
    logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample(
  sampling: Sampling,
  key_B: Key[Array, ' B'],
  logits_BV: Float32[Array, 'B V'],
  seen_BV: Bool[Array, 'B V'] | None = None,
) -> Int32[Array, ' B']:
  """One token a row, each drawn with its own key.

  `seen_BV` marks what the repetition penalty bears on; None: nothing.
  """
  if seen_BV is not None:
    logits_BV = penalized_logits(sampling, logits_BV, seen_BV)
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = filtered_logits(sampling, logits_BV)
  return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)
