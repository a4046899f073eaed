# SPDX-License-Identifier: Apache-2.0
"""Does a ternary model's loss decelerate, and do its tokens come to disagree?"""

import dataclasses

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.quantize import Family
from tritera_jax.ternary.schedule import InfiniteSchedule

FAMILIES: dict[str, Family] = {'trilm': 'ternary', 'floatlm': 'float'}


def constant(rate: float, warmup_steps: int) -> InfiniteSchedule:
  """Warm-up, then always `rate`: a cooldown from a peak that is no higher."""
  return InfiniteSchedule(rate, rate, rate, warmup_steps, cooldown_steps=0)


def mini(prefix: str) -> Experiment:
  return Experiment(
    ModelConfig(
      family=FAMILIES[prefix],
      vocab_size=4096,
      layers=2,
      d_model=128,
      d_ff=384,
      heads=2,
      kv_heads=2,
      head_dim=64,
      context_length=128,
    ),
    DataConfig('data/quickstart', batch_size=8, sequence_length=128),
    OptimizerConfig(constant(2e-3, warmup_steps=50)),
    RunConfig(
      f'runs/dynamics/mini_{prefix}',
      steps=4096,
      log_every=1,
      save_share=1.0,
      keep_powers=True,
      tensorboard=False,
    ),
  )


def paper(prefix: str) -> Experiment:
  base = mini(prefix)
  return Experiment(
    dataclasses.replace(
      base.model,
      vocab_size=50_277,
      layers=4,
      d_model=256,
      d_ff=1024,
      heads=4,
      kv_heads=4,
      context_length=1024,
      dtype='bfloat16',
    ),
    DataConfig('data/slimpajama', batch_size=512, sequence_length=1024),
    OptimizerConfig(constant(1.26e-3, warmup_steps=2000)),
    dataclasses.replace(
      base.run, folder=f'runs/dynamics/{prefix}', steps=262_144
    ),
  )


def sweep() -> dict[str, Experiment]:
  return {f'mini_{prefix}': mini(prefix) for prefix in FAMILIES} | {
    prefix: paper(prefix) for prefix in FAMILIES
  }
