# SPDX-License-Identifier: Apache-2.0
"""Ternary language models: what scripts and notebooks call, by one import.

Each verb of the command line is a function here with the same arguments.
Names are imported when first used: `import tritera_jax` imports no JAX. Every
name is a class, or a verb with its object where the verb alone is taken: no
name may be that of a submodule (`train`, `eval`, ...), which importing it
would overwrite.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from tritera_jax.checkpoint.pack import latent_fingerprint
  from tritera_jax.checkpoint.pack import pack as pack_run
  from tritera_jax.checkpoint.restore import restore_params
  from tritera_jax.checkpoint.save import read_model as model_of
  from tritera_jax.data.prepare import prepare as prepare_dataset
  from tritera_jax.data.shards import open_split
  from tritera_jax.eval.baselines import all_baselines
  from tritera_jax.eval.choice import Question
  from tritera_jax.eval.choice import score as score_choices
  from tritera_jax.eval.perplexity import evaluate
  from tritera_jax.experiment import (
    DataConfig,
    Experiment,
    OptimizerConfig,
    RunConfig,
  )
  from tritera_jax.experiment_file import load as load_experiment
  from tritera_jax.generate.load import complete, complete_all, stream
  from tritera_jax.generate.load import load as load_model
  from tritera_jax.generate.sampling import Sampling
  from tritera_jax.model.config import ModelConfig
  from tritera_jax.model.flops import linear_parameters
  from tritera_jax.model.quantized import codes_and_scales
  from tritera_jax.model.quantized import latents as latent_matrices
  from tritera_jax.parallel.mesh import MeshConfig
  from tritera_jax.quantlm.run import Quantization
  from tritera_jax.quantlm.run import quantize as quantize_run
  from tritera_jax.show import describe
  from tritera_jax.ternary.layers import straight_through_matmul
  from tritera_jax.ternary.quantize import ternarize
  from tritera_jax.train.loop import restore_run
  from tritera_jax.train.loop import train as train_experiment
  from tritera_jax.train.metrics import read as read_metrics
  from tritera_kernels.cpu.library import read_gb_per_s
  from tritera_kernels.doctor import report as check_kernels
  from tritera_kernels.matmul.api import ternary_matmul
  from tritera_kernels.packed import pack as pack_codes

# The module of each name, and what it is called there if that is another.
_PLACES = {
  'DataConfig': 'tritera_jax.experiment',
  'Experiment': 'tritera_jax.experiment',
  'MeshConfig': 'tritera_jax.parallel.mesh',
  'ModelConfig': 'tritera_jax.model.config',
  'OptimizerConfig': 'tritera_jax.experiment',
  'Quantization': 'tritera_jax.quantlm.run',
  'Question': 'tritera_jax.eval.choice',
  'RunConfig': 'tritera_jax.experiment',
  'Sampling': 'tritera_jax.generate.sampling',
  'all_baselines': 'tritera_jax.eval.baselines',
  'check_kernels': 'tritera_kernels.doctor:report',
  'codes_and_scales': 'tritera_jax.model.quantized',
  'complete': 'tritera_jax.generate.load',
  'complete_all': 'tritera_jax.generate.load',
  'describe': 'tritera_jax.show',
  'evaluate': 'tritera_jax.eval.perplexity',
  'latent_fingerprint': 'tritera_jax.checkpoint.pack',
  'latent_matrices': 'tritera_jax.model.quantized:latents',
  'linear_parameters': 'tritera_jax.model.flops',
  'load_experiment': 'tritera_jax.experiment_file:load',
  'load_model': 'tritera_jax.generate.load:load',
  'model_of': 'tritera_jax.checkpoint.save:read_model',
  'open_split': 'tritera_jax.data.shards',
  'pack_codes': 'tritera_kernels.packed:pack',
  'pack_run': 'tritera_jax.checkpoint.pack:pack',
  'prepare_dataset': 'tritera_jax.data.prepare:prepare',
  'quantize_run': 'tritera_jax.quantlm.run:quantize',
  'read_gb_per_s': 'tritera_kernels.cpu.library',
  'read_metrics': 'tritera_jax.train.metrics:read',
  'restore_params': 'tritera_jax.checkpoint.restore',
  'restore_run': 'tritera_jax.train.loop',
  'score_choices': 'tritera_jax.eval.choice:score',
  'straight_through_matmul': 'tritera_jax.ternary.layers',
  'stream': 'tritera_jax.generate.load',
  'ternarize': 'tritera_jax.ternary.quantize',
  'ternary_matmul': 'tritera_kernels.matmul.api',
  'train_experiment': 'tritera_jax.train.loop:train',
}

__all__ = [
  'DataConfig',
  'Experiment',
  'MeshConfig',
  'ModelConfig',
  'OptimizerConfig',
  'Quantization',
  'Question',
  'RunConfig',
  'Sampling',
  'all_baselines',
  'check_kernels',
  'codes_and_scales',
  'complete',
  'complete_all',
  'describe',
  'evaluate',
  'latent_fingerprint',
  'latent_matrices',
  'linear_parameters',
  'load_experiment',
  'load_model',
  'model_of',
  'open_split',
  'pack_codes',
  'pack_run',
  'prepare_dataset',
  'quantize_run',
  'read_gb_per_s',
  'read_metrics',
  'restore_params',
  'restore_run',
  'score_choices',
  'straight_through_matmul',
  'stream',
  'ternarize',
  'ternary_matmul',
  'train_experiment',
]


def __getattr__(name: str):
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, _, there = _PLACES[name].partition(':')
  value = getattr(importlib.import_module(module), there or name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
