# SPDX-License-Identifier: Apache-2.0
"""Runs of random models, which nothing has trained."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
import shutil
from typing import NamedTuple

import jax

from tests import tiny
from tritera_jax.checkpoint import save
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params


class _Weights(NamedTuple):
  params: Params


def shape(**fields) -> ModelConfig:
  """The tiny model with other fields; logits depend on all its layers."""
  plain = dataclasses.replace(
    tiny.MODEL, qk_norm=False, scale_blocks=1, init_std=0.2
  )
  return dataclasses.replace(plain, **fields)


def random_params(model: ModelConfig, seed: int = 0) -> Params:
  """Initial parameters with random gains: a misplaced norm shows."""
  key = jax.random.key(seed)
  leaves, tree = jax.tree.flatten_with_path(decoder.init(model, key))
  return jax.tree.unflatten(
    tree,
    [
      jax.random.uniform(
        jax.random.fold_in(key, n), leaf.shape, minval=0.5, maxval=1.5
      )
      if _is_gain(path)
      else leaf
      for n, (path, leaf) in enumerate(leaves)
    ],
  )


def _is_gain(path: Sequence) -> bool:
  return path[-1].key == 'scale'


def make(
  folder: Path,
  data: Path,
  model: ModelConfig,
  params: Params | None = None,
  step: int = 7,
) -> Path:
  """A run's folder with a checkpoint of these parameters, or random ones."""
  experiment = dataclasses.replace(
    tiny.experiment(data, folder, 20), model=model
  )
  save.write_experiment(experiment, folder)
  shutil.copyfile(data / 'tokenizer.json', folder / 'tokenizer.json')
  if params is None:
    params = random_params(model)
  with save.writing(folder, experiment.run) as checkpoints:
    save.save(checkpoints, step, model, _Weights(params))
  return folder
