# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import numpy as np
import pytest

from tests import tiny
from tritera_jax.checkpoint import restore
from tritera_jax.data import shards
from tritera_jax.experiment import OptimizerConfig
from tritera_jax.ternary.schedule import CosineSchedule
from tritera_jax.train import loop, start


def starting(data, folder, run, **model):
  """Two steps from a run's parameters, at a rate of 0."""
  experiment = tiny.experiment(data, folder, 2, start_from=str(run))
  return dataclasses.replace(
    experiment,
    model=dataclasses.replace(experiment.model, **model),
    optimizer=OptimizerConfig(CosineSchedule(0.0, 1)),
  )


def test_a_run_starts_from_another_s_parameters_alone(
  tiny_data, tiny_run, tmp_path
):
  # A TriLM's latents are a FloatLM's weights, and the other way round.
  experiment = starting(tiny_data, tmp_path, tiny_run, family='float')
  state = loop.train(experiment, quiet=True)
  _, want = restore.restore_params(tiny_run)
  jax.tree.map(np.testing.assert_array_equal, state.params, want)
  assert int(state.step) == 2
  counts = {
    int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0
  }
  assert counts == {2}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'d_ff': 192}, 'start_from=.*model.d_ff: 96 there, 192 here'),
    ({'sub_norm': True}, 'model.sub_norm: False there, True here'),
    ({'rope_theta': 5.0}, 'model.rope_theta: 10000.0 there, 5.0 here'),
  ],
)
def test_another_model_s_parameters_are_refused(
  tiny_data, tiny_run, tmp_path, changes, message
):
  experiment = starting(tiny_data, tmp_path / 'run', tiny_run, **changes)
  with pytest.raises(ValueError, match=message):
    loop.train(experiment, quiet=True)
  assert not (tmp_path / 'run').exists()


def test_what_is_no_start_is_refused(tiny_data, tiny_run, tmp_path):
  tokenizer = shards.read_tokenizer(tiny_data)
  experiment = starting(tiny_data, tmp_path / 'run', tmp_path)
  with pytest.raises(FileNotFoundError, match='is not a run folder'):
    start.check(experiment, tokenizer)
  experiment = starting(tiny_data, tmp_path / 'run', tiny_run)
  start.check(experiment, tokenizer)
  tokenizer.add_tokens(['another'])
  with pytest.raises(ValueError, match='has another tokenizer than'):
    start.check(experiment, tokenizer)


def test_a_run_that_goes_on_does_not_ask_for_its_start(tiny_data, tiny_run):
  experiment = starting(tiny_data, tiny_run, 'gone')
  start.check(experiment, shards.read_tokenizer(tiny_data))
