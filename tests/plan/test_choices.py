# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
from pathlib import Path

import pytest

from tests import tiny
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.plan import choices
from tritera_jax.plan.targets import Chip, Target

CHIP = Chip('chip', 1e12, 1e9, 1e10, fast=1e9, slow=1e8, domain=4)


@pytest.fixture
def experiment():
  return tiny.experiment(Path('data'), Path('run'), 10)


def test_every_mesh_has_all_devices():
  found = list(choices.meshes(12, 64))
  assert all(math.prod(sizes.values()) == 12 for sizes in found)
  assert {'data': 2, 'fsdp': 3, 'context': 1, 'tensor': 2} in found
  assert {'data': 12, 'fsdp': 1, 'context': 1, 'tensor': 1} in found
  tensors = {sizes['tensor'] for sizes in found}
  assert tensors == {1, 2, 3, 4, 6}


def test_what_fits_comes_first_and_the_fastest_of_it(experiment):
  roomy = choices.ranked(experiment, Target('chip-4', CHIP, 4))
  seconds = [choice.costs.seconds for choice in roomy]
  assert all(choice.costs.fits for choice in roomy)
  assert seconds == sorted(seconds)
  # Half of what the best takes: others are found, or more parts.
  least = min(choice.costs.peak_memory for choice in roomy)
  most = max(choice.costs.peak_memory for choice in roomy)
  small = dataclasses.replace(CHIP, memory=(least + most) / 2)
  tight = choices.ranked(experiment, Target('chip-4', small, 4))
  fits = [choice.costs.fits for choice in tight]
  assert fits == sorted(fits, reverse=True) and fits[0]
  for choice in tight:
    mesh, run = choice.experiment.mesh, choice.experiment.run
    assert 8 % (mesh.data * mesh.fsdp * run.accumulation) == 0
    assert choice.costs.fits == (
      choice.costs.peak_memory <= 0.92 * small.memory
    )
  loser = next((c for c in tight if not c.costs.fits), None)
  if loser:
    assert 'needs' in choices.why_not(loser, tight[0])


def test_flags_are_those_of_the_command_line(experiment):
  choice = choices.own(
    dataclasses.replace(experiment, mesh=MeshConfig(2, -1, 1)),
    Target('chip-8', CHIP, 8),
  )
  assert choice.flags == (
    '--mesh.data 2 --mesh.fsdp 4 --mesh.tensor 1 --run.remat none '
    '--run.accumulation 1'
  )


def test_why_another_is_better(experiment):
  far = Target('chip-8', dataclasses.replace(CHIP, slow=1e6), 8)
  own = choices.own(
    dataclasses.replace(experiment, mesh=MeshConfig(1, 8, 1)), far
  )
  quick = dataclasses.replace(own.costs, network=own.costs.network / 10)
  best = dataclasses.replace(own, costs=quick)
  assert 'network +' in choices.why_not(own, best)
  assert choices.why_not(best, best) == 'as fast, by this estimate'


def test_a_batch_for_no_mesh_is_refused(experiment):
  data = dataclasses.replace(experiment.data, batch_size=5)
  odd = dataclasses.replace(experiment, data=data)
  with pytest.raises(ValueError, match='data.batch_size=5 .*larger batch'):
    choices.ranked(odd, Target('chip-7', CHIP, 7))
