# SPDX-License-Identifier: Apache-2.0
from jax.sharding import PartitionSpec
import pytest

from tritera_jax.parallel import rules


def test_axes_without_a_rule_stay_whole():
  assert rules.spec(('layers', 'embed', 'mlp')) == PartitionSpec(
    None, ('fsdp', 'context'), 'tensor'
  )


def test_two_dimensions_on_one_mesh_axis_are_refused():
  with pytest.raises(ValueError, match='cannot split two dimensions'):
    rules.spec(('heads', 'mlp'))
  with pytest.raises(ValueError, match='cannot split two dimensions'):
    rules.spec(('batch', 'embed'))
  with pytest.raises(ValueError, match='cannot split two dimensions'):
    rules.spec(('sequence', 'embed'))
