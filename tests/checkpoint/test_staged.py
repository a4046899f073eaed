# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tritera_jax.checkpoint import restore, save, staged
from tritera_jax.model import decoder
from tritera_jax.parallel import digest


class State(NamedTuple):
  params: Any


def test_staged_parameters_are_saved_as_those_in_memory(tmp_path):
  """With the digest that reading them checks."""
  experiment = tiny.experiment(tmp_path, tmp_path, 1)
  params = decoder.init(experiment.model, jax.random.key(0))
  (tmp_path / 'staged').mkdir()
  there = staged.empty(
    decoder.abstract_params(experiment.model), tmp_path / 'staged'
  )
  jax.tree.map(lambda to, leaf: to.__setitem__(..., leaf), there, params)
  save.write_experiment(experiment, tmp_path)
  with save.writing(tmp_path, experiment.run) as checkpoints:
    save.save(checkpoints, 0, experiment.model, State(there))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
    decoder.abstract_params(experiment.model),
  )
  got = restore.restore_start(tmp_path, target)
  jax.tree.map(np.testing.assert_array_equal, got, params)


def test_digests_of_pieces_are_those_of_the_whole():
  rng = np.random.default_rng(0)
  tree = {
    'a': rng.normal(size=(3, 5, 7)).astype('f'),
    'b': rng.integers(0, 9, 11, np.int32),
  }
  want = int(digest.digest(jax.tree.map(jnp.asarray, tree)))
  for piece in (1, 4, 13, 1000):
    assert digest.digest_on_disk(tree, piece) == want
