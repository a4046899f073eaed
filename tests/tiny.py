# SPDX-License-Identifier: Apache-2.0
"""A run small enough to train in a test, on real text: Python's json."""

import dataclasses
from pathlib import Path
import sysconfig

from tritera_jax.data import prepare
from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.ternary.schedule import TriLMSchedule

MODEL = ModelConfig(
  family='ternary',
  vocab_size=384,
  layers=2,
  d_model=48,
  d_ff=96,
  heads=4,
  kv_heads=2,
  head_dim=12,
  context_length=32,
  scale_blocks=2,
  qk_norm=True,
)


def dataset(folder: Path) -> Path:
  corpus = Path(sysconfig.get_path('stdlib')) / 'json'
  prepare.prepare(
    str(corpus), str(folder), vocab_size=MODEL.vocab_size, holdout=0.3
  )
  return folder


def experiment(data: Path, folder: Path, steps: int, **run) -> Experiment:
  return Experiment(
    MODEL,
    DataConfig(str(data), batch_size=8, sequence_length=32),
    OptimizerConfig(TriLMSchedule(1e-2, 7e-3, warmup_steps=3)),
    RunConfig(
      str(folder),
      steps,
      **{
        'log_every': 2, 'telemetry_every': 5, 'save_every': 10,
        'evaluate_every': 10, 'evaluate_tokens': 500, 'tensorboard': False,
        **run,
      },
    ),
    MeshConfig(data=2, fsdp=2, tensor=2),
  )  # fmt: skip


def with_run(experiment: Experiment, **fields) -> Experiment:
  run = dataclasses.replace(experiment.run, **fields)
  return dataclasses.replace(experiment, run=run)
