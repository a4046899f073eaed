# SPDX-License-Identifier: Apache-2.0
"""A run that nobody trained: scores are as good to compare with any weights."""

import dataclasses
from pathlib import Path
import sysconfig

import jax
import pytest

from tests import tiny
from tritera_jax.checkpoint import pack, save
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.generate import load
from tritera_jax.generate.load import Loaded
from tritera_jax.model import decoder

# Weights of this size make some tokens a thousand times as likely as others.
MODEL = dataclasses.replace(tiny.MODEL, init_std=0.4, context_length=64)


@pytest.fixture(scope='session')
def random_run(made_once) -> Path:
  """Of random weights and packed, to be read and not written."""

  def make(folder: Path):
    experiment = dataclasses.replace(
      tiny.experiment(Path('nowhere'), folder, 1), model=MODEL
    )
    text = (Path(sysconfig.get_path('stdlib')) / 'bisect.py').read_text()
    tokenizer = tokenizer_lib.train_tokenizer([text], MODEL.vocab_size)
    save.write_experiment(experiment, folder)
    tokenizer.save(str(folder / 'tokenizer.json'))
    params = jax.jit(decoder.init, static_argnums=0)(MODEL, jax.random.key(0))
    with save.writing(folder, experiment.run) as checkpoints:
      save.save(checkpoints, 1, MODEL, save.Weights(params))
    pack.pack(folder)

  return made_once('random_run', make)


@pytest.fixture(scope='session')
def latent(random_run) -> Loaded:
  return load.load(random_run)


@pytest.fixture(scope='session')
def packed(random_run) -> Loaded:
  return load.load(random_run / 'packed' / 'two_bit', cache='float32')
