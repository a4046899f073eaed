# SPDX-License-Identifier: Apache-2.0
import pytest

from tritera_jax.plan import targets


def test_a_target_is_a_chip_and_how_many():
  target = targets.parse('h100-1024')
  assert target.devices == 1024 and target.domain == 8
  # NVIDIA's data sheet of the H100 SXM.
  assert target.chip.peak == 989e12
  assert (target.chip.memory, target.chip.bandwidth) == (80e9, 3.35e12)
  # 900 GB/s of NVLink and 400 Gbit/s of InfiniBand, both ways and one.
  assert (target.chip.fast, target.chip.slow) == (900e9 / 2, 400e9 / 8)
  assert targets.parse('h100-4').domain == 4


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('h10-8', 'no chip .h10.; did you mean h100-8'),
    ('v5e', 'is not CHIP-N, such as v5e-256'),
    ('v5e-0', 'is not CHIP-N'),
    ('abacus-8', 'Known: v4-N, v5e-N'),
  ],
)
def test_an_unknown_target_is_answered_with_those_that_are_known(name, words):
  with pytest.raises(ValueError, match=words):
    targets.parse(name)


@pytest.mark.parametrize(
  ('name', 'topology'),
  [
    # As Google's documentation lists the slices.
    ('v5e-256', 'v5e:16x16'),
    ('v5e-8', 'v5e:2x4'),
    ('v6e-64', 'v6e:8x8'),
    ('v5p-4', 'v5p:2x2x1'),
    ('v5p-128', 'v5p:4x4x8'),
    ('v4-32', 'v4:2x4x4'),
    ('v5e-512', None),  # two slices
    ('v5e-48', None),
    ('h100-8', None),
  ],
)
def test_a_slice_has_the_name_that_the_compiler_knows(name, topology):
  assert targets.topology_name(targets.parse(name)) == topology
