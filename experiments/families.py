# SPDX-License-Identifier: Apache-2.0
"""What do ternary and binary weights cost against float ones, at this size?

The quickstart's shape and corpus at 500 steps (0.51M tokens), three families,
three seeds each of initial weights and batch order.

  machine   2 CPU cores; about 75 s a run
  expected  @@FAMILIES@@
  command   make quickstart   (for the dataset)
            tritera train experiments/families.py:trilm_0
            tritera eval runs/families/trilm_0

TriLM and BiLM take the quickstart's schedule; FloatLM the paper's cosine, its
peak the best of 1e-3, 2e-3 and 4e-3 (@@RATES@@ bits a byte). Unlike
quickstart.py: fewer steps, no evaluation on the way.
"""

import dataclasses

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.quantize import Family
from tritera_jax.ternary.schedule import CosineSchedule, TriLMSchedule

FAMILIES: dict[str, Family] = {
  'trilm': 'ternary',
  'bilm': 'binary',
  'floatlm': 'float',
}
SEEDS = 3

TERNARY = ModelConfig(
  family='ternary',
  vocab_size=4096,
  layers=2,
  d_model=256,
  d_ff=768,
  heads=2,
  kv_heads=2,
  head_dim=128,
  context_length=128,
)


def member(prefix: str, seed: int) -> Experiment:
  if prefix == 'floatlm':
    schedule = CosineSchedule(2e-3, warmup_steps=50)
  else:
    schedule = TriLMSchedule(2e-3, 1.32e-3, warmup_steps=50)
  return Experiment(
    dataclasses.replace(TERNARY, family=FAMILIES[prefix]),
    DataConfig('data/quickstart', 8, 128, seed=seed),
    OptimizerConfig(schedule),
    RunConfig(f'runs/families/{prefix}_{seed}', steps=500, seed=seed),
  )


def sweep() -> dict[str, Experiment]:
  return {
    f'{prefix}_{seed}': member(prefix, seed)
    for prefix in FAMILIES
    for seed in range(SEEDS)
  }
