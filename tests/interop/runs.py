# SPDX-License-Identifier: Apache-2.0
"""Runs of random models, which nothing has trained."""

import dataclasses
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tritera_jax.checkpoint import save
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params


def shape(**fields) -> ModelConfig:
  """The tiny model with other fields; logits depend on all its layers."""
  plain = dataclasses.replace(
    tiny.MODEL, qk_norm=False, scale_blocks=1, init_std=0.2
  )
  return dataclasses.replace(plain, **fields)


def random_params(model: ModelConfig, seed: int = 0) -> Params:
  """Random weights and gains: a misplaced norm shows."""
  generator = np.random.default_rng(seed)

  def fill(path, leaf):
    if path[-1].key == 'scale':
      values = generator.uniform(0.5, 1.5, leaf.shape)
    else:
      values = model.init_std * generator.standard_normal(leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  return jax.tree.map_with_path(fill, decoder.abstract_params(model))


def describe(folder: Path, data: Path, model: ModelConfig) -> Experiment:
  """Makes a run's folder without a checkpoint."""
  experiment = dataclasses.replace(
    tiny.experiment(data, folder, 20), model=model
  )
  save.write_experiment(experiment, folder)
  shutil.copyfile(data / 'tokenizer.json', folder / 'tokenizer.json')
  return experiment


def make(
  folder: Path,
  data: Path,
  model: ModelConfig,
  params: Params | None = None,
  step: int = 7,
) -> Path:
  """A run's folder with a checkpoint of these parameters, or random ones."""
  experiment = describe(folder, data, model)
  if params is None:
    params = random_params(model)
  with save.writing(folder, experiment.run) as checkpoints:
    save.save(checkpoints, step, model, save.Weights(params))
  return folder
