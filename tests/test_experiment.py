# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from tests.train.test_step import EXPERIMENT
from tritera_jax import experiment as experiment_lib
from tritera_jax import experiment_file
from tritera_jax.ternary.schedule import CosineSchedule, InfiniteSchedule

INFINITE = InfiniteSchedule(1e-3, 3e-4, 1e-5, 2, 2, annealing_steps=8)


@pytest.mark.parametrize(('schedule', 'muon'), [
  (EXPERIMENT.optimizer.schedule, None),
  (CosineSchedule(1e-3, 10, final_fraction=0.0), None),
  (INFINITE, experiment_lib.MuonConfig(rms=None)),
])  # fmt: skip
def test_json_both_ways(schedule, muon):
  optimizer = dataclasses.replace(
    EXPERIMENT.optimizer, schedule=schedule, muon=muon
  )
  experiment = dataclasses.replace(EXPERIMENT, optimizer=optimizer)
  text = experiment_lib.to_json(experiment)
  assert experiment_lib.from_json(text) == experiment


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('model.layers', '4', 'model.layers: Input should be a valid integer'),
    ('model.layers', 2.5, 'model.layers: '),
    ('model.depth', 4, 'model.depth: Unexpected keyword argument'),
    ('model.layers', 0, 'model.layers=0 must be >= 1'),
    ('model.family', 'quaternary', "model.family: .*'ternary', 'binary'"),
    ('run.keep', 0, 'run.keep=0 must be >= 1'),
    ('optimizer.schedule.kind', 'square', 'optimizer.schedule'),
    ('optimizer.muon', {'beta': 1.0}, 'optimizer.muon.beta=1.0 must lie'),
    (
      'optimizer.schedule',
      dataclasses.asdict(INFINITE) | {'annealing_steps': 9},
      'annealing_steps=9 after 4 .* run.steps=12',
    ),
    ('data.sequence_length', 17, 'sequence_length=17 exceeds'),
  ],
)
def test_a_bad_field_is_named(path, value, message):
  tree = json.loads(experiment_lib.to_json(EXPERIMENT))
  *parents, leaf = path.split('.')
  node = tree
  for key in parents:
    node = node[key]
  node[leaf] = value
  with pytest.raises(ValueError, match=message):
    experiment_lib.from_json(json.dumps(tree))


def test_what_is_no_json_or_lacks_a_field_is_named():
  with pytest.raises(ValueError, match=r'run/experiment\.json: .*JSON'):
    experiment_lib.from_json('{', 'run/experiment.json')
  with pytest.raises(ValueError, match='model: Field required'):
    experiment_lib.from_json('{}')


def test_a_file_that_defines_nothing_is_refused(tmp_path):
  file = tmp_path / 'empty.py'
  file.write_text('x = 1\n')
  with pytest.raises(ValueError, match='defines neither experiment'):
    experiment_file.load(str(file))
