# SPDX-License-Identifier: Apache-2.0
"""Learning-rate and weight-decay schedules (Spectra, 3.1 and Table 3).

Each schedule gives both as functions of the step, for a run of `steps`
steps; both are traceable.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp


def _warmup(step: jax.Array | int, warmup_steps: int) -> jax.Array:
  """Linear from 1/warmup_steps to 1, so that the first step moves."""
  return jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))


def _check(schedule):
  for field in ('peak', 'weight_decay', 'warmup_steps'):
    value = getattr(schedule, field)
    if not 0 <= value < float('inf'):
      raise ValueError(f'schedule.{field}={value} must be >= 0 and finite')


@dataclasses.dataclass(frozen=True)
class TriLMSchedule:
  """Linear decay to 0 with two interventions, the paper's for TriLM.

  Attributes:
    peak: learning rate after warm-up.
    second_peak: what `peak` is replaced by from `drop_at` on: a step down,
      on a line that still reaches 0 at the last step.
    warmup_steps: steps of linear warm-up. (The paper does not state its.)
    weight_decay: until `decay_until`; 0 after it, for good.
    drop_at: fraction of the run after which `second_peak` holds.
    decay_until: fraction of the run after which weight decay is 0.
  """

  peak: float
  second_peak: float
  warmup_steps: int
  weight_decay: float = 0.1
  drop_at: float = 1 / 2
  decay_until: float = 2 / 3
  kind: Literal['trilm'] = 'trilm'

  def __post_init__(self):
    _check(self)
    for field in ('drop_at', 'decay_until'):
      if not 0 <= getattr(self, field) <= 1:
        raise ValueError(
          f'schedule.{field}={getattr(self, field)} must lie in [0, 1]'
        )

  def learning_rate(self, step: jax.Array | int, steps: int) -> jax.Array:
    peak = jnp.where(step < self.drop_at * steps, self.peak, self.second_peak)
    left = jnp.maximum(0.0, (steps - step) / steps)
    return peak * left * _warmup(step, self.warmup_steps)

  def decay(self, step: jax.Array | int, steps: int) -> jax.Array:
    return jnp.where(step < self.decay_until * steps, self.weight_decay, 0.0)


@dataclasses.dataclass(frozen=True)
class CosineSchedule:
  """Cosine decay with warm-up and constant weight decay, FloatLM's.

  Attributes:
    peak: learning rate after warm-up.
    warmup_steps: steps of linear warm-up.
    weight_decay: constant.
    final_fraction: learning rate of the last step as a fraction of `peak`.
  """

  peak: float
  warmup_steps: int
  weight_decay: float = 0.1
  final_fraction: float = 0.1
  kind: Literal['cosine'] = 'cosine'

  def __post_init__(self):
    _check(self)
    if not 0 <= self.final_fraction <= 1:
      raise ValueError(
        f'schedule.final_fraction={self.final_fraction} must lie in [0, 1]'
      )

  def learning_rate(self, step: jax.Array | int, steps: int) -> jax.Array:
    after = jnp.maximum(step - self.warmup_steps, 0)
    done = jnp.minimum(after / max(steps - self.warmup_steps, 1), 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
    fraction = self.final_fraction + (1 - self.final_fraction) * cosine
    return self.peak * fraction * _warmup(step, self.warmup_steps)

  def decay(self, step: jax.Array | int, steps: int) -> jax.Array:
    del step, steps
    return jnp.float32(self.weight_decay)


Schedule = TriLMSchedule | CosineSchedule
