# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from tests import tiny
from tritera_jax.train import bench


def test_every_round_gives_each_ratio(tmp_path):
  experiment = tiny.experiment(tmp_path, tmp_path, 10)
  found = bench.ratios(experiment, rounds=2, steps=1)
  assert set(found) == {'seconds', 'float', 'binary', 'telemetry'}
  assert all(len(v) == 2 and min(v) > 0 for v in found.values())


def test_a_model_that_is_not_ternary_has_no_twins(tmp_path):
  experiment = tiny.experiment(tmp_path, tmp_path, 10)
  model = dataclasses.replace(experiment.model, family='float')
  with pytest.raises(ValueError, match="name a 'ternary' experiment"):
    bench.ratios(dataclasses.replace(experiment, model=model), 1, 1)
