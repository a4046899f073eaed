# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import tiny
from tests.interop import checkpoints
from tritera_jax import cli
from tritera_jax.checkpoint import restore, save
from tritera_jax.data import prepare, shards
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


EXPERIMENT = """
import dataclasses
from pathlib import Path
from tests import tiny
import tritera_jax as tt

def experiment():
  run, data, folder = {paths!r}
  made = tiny.experiment(Path(data), Path(folder), 2, start_from=run)
  return dataclasses.replace(made, model=tt.model_of(run))
"""


def test_an_import_s_rows_may_be_more_than_the_tokenizer_s_tokens(
  tmp_path, capsys
):
  """As TriLM's: 50304 rows, 50277 tokens."""
  source = checkpoints.write(
    tmp_path / 'hf',
    checkpoints.KINDS['trilm_2'],
    checkpoints.tensors('trilm_2'),
  )
  run, data = str(tmp_path / 'imported'), str(tmp_path / 'data')
  assert cli.main(['import', str(source), '--out', run]) == 0
  prepare.prepare(
    str(Path(json.__file__).parent), data, holdout=0.3,
    tokenizer=f'{run}/tokenizer.json',
  )  # fmt: skip
  tokens = shards.read_manifest(data).vocab_size
  assert tokens < checkpoints.V
  paths = (run, data, str(tmp_path / 'next'))
  file = tmp_path / 'next.py'
  file.write_text(EXPERIMENT.format(paths=paths))
  args, count = ['train', str(file)], ['--model.vocab-size', str(tokens)]
  capsys.readouterr()
  assert cli.main([*args, *count]) == 1
  advice = 'set --model.vocab-size 384 --model.vocab-multiple 1'
  assert advice in capsys.readouterr().err
  assert cli.main([*args, '--run.start-from', '', *count[:1], '384']) == 1
  assert f'set {" ".join(count)}' in capsys.readouterr().err
  assert cli.main(args) == 0
  _, params = restore.restore_params(tmp_path / 'next')
  assert len(params['embed']['embedding']) == checkpoints.V
  # 192 rows for each of two scale blocks.
  padded = dataclasses.replace(
    save.read_experiment(run).model, vocab_size=tokens, vocab_multiple=192
  )
  experiment = tiny.experiment(data, tmp_path / 'new', 2, start_from=run)
  start.check(
    dataclasses.replace(experiment, model=padded), shards.read_tokenizer(data)
  )
