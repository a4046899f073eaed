# SPDX-License-Identifier: Apache-2.0
"""How well does a TriLM write Python after three minutes on two CPU cores?"""

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import TriLMSchedule


def experiment() -> Experiment:
  return Experiment(
    ModelConfig(
      family='ternary',
      vocab_size=4096,
      layers=4,
      d_model=256,
      d_ff=768,
      heads=2,
      kv_heads=2,
      head_dim=128,
      context_length=128,
    ),
    DataConfig('data/quickstart', batch_size=8, sequence_length=128),
    OptimizerConfig(TriLMSchedule(1.5e-3, 1e-3, warmup_steps=50)),
    RunConfig(
      'runs/quickstart',
      steps=900,
      telemetry_every=50,
      evaluate_every=300,
      evaluate_tokens=16_384,
      save_every=300,
    ),
  )
