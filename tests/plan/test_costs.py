# SPDX-License-Identifier: Apache-2.0
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests import tiny
from tritera_jax.experiment import MuonConfig
from tritera_jax.parallel import mesh
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.plan import aot, costs, traced
from tritera_jax.plan.targets import Chip, Target

CHIP = Chip('chip', 1e12, 1e9, 1e10, fast=1e9, slow=1e8, domain=4)
TARGET = Target('chip-8', CHIP, 8)


@pytest.fixture
def experiment():
  return tiny.experiment(Path('data'), Path('run'), 10)


def weights(heads=4, kv=2, ff=96):
  """Of the blocks' matrices, by hand: width 48, heads of 12, two blocks."""
  return 2 * (2 * 48 * 12 * heads + 2 * 48 * 12 * kv + 3 * 48 * ff)


def with_mesh(experiment, data, fsdp, tensor, **run):
  mesh = MeshConfig(data, fsdp, tensor)
  return dataclasses.replace(tiny.with_run(experiment, **run), mesh=mesh)


def test_products_count_as_often_as_their_loop_runs():
  def program(w_KN, x_MK):
    body = lambda x_MK, _: (jnp.tanh(x_MK @ w_KN), None)
    return jax.lax.scan(jax.checkpoint(body), x_MK, length=5)[0]

  w_KN, x_MK = jnp.ones((8, 8)), jnp.ones((3, 8), jnp.float32)
  found = traced.matmuls(jax.make_jaxpr(program)(w_KN, x_MK).jaxpr)
  assert found == (5 * 2 * 3 * 8 * 8, 5 * 4 * (3 * 8 + 8 * 8 + 3 * 8))


@pytest.mark.parametrize(('sizes', 'parts'), [((2, 2, 2), 1), ((1, 4, 2), 2)])
def test_flops_of_a_device_are_its_share(experiment, sizes, parts):
  laid_out = with_mesh(experiment, *sizes, accumulation=parts)
  found = costs.of(laid_out, TARGET)
  tokens = 8 * 32 / (sizes[0] * sizes[1])
  # Half the heads, of the MLP and of the 512 columns of the head.
  products = weights(2, 1, 48) + 48 * 256
  attention = 2 * (2 * 12) * 32  # all T x T, for scores and for values
  assert found.flops == 6 * tokens * (products + 2 * attention)
  # The model's count has the causal half, and nothing twice.
  whole = weights() + 48 * 512 + 2 * 32 * 48
  assert found.model_flops == 6 * 8 * 32 * whole


def test_recomputing_adds_the_forward_pass_of_the_blocks(experiment):
  none, block = (
    costs.of(with_mesh(experiment, 8, 1, 1, remat=remat), TARGET)
    for remat in ('none', 'block')
  )
  more = (block.flops - none.flops) / 32  # of a token
  forward = 2 * (weights() + 2 * 2 * 48 * 32)
  # All but the last product of a block, whose result nobody needs again.
  assert more == forward - 2 * 2 * 48 * 96
  assert block.memory['kept for backward'] < none.memory['kept for backward']


def test_state_and_arguments_are_the_compilers(experiment):
  found = costs.of(experiment, TARGET)
  compiled = aot.compile_on(experiment, jax.devices(), 'cpu')
  tokens = 4 * (8 // 4) * 33
  assert compiled.arguments == found.memory['state'] + tokens + 4  # and n
  temporaries = found.peak_memory - found.memory['state']
  assert 0.4 < compiled.temporaries / temporaries < 2.5


def test_muon_keeps_one_moment_of_the_blocks_matrices(experiment):
  one = tuple((axis, 1) for axis in mesh.AXES)
  adamw, parameters = costs.state_bytes(experiment, one)
  optimizer = dataclasses.replace(experiment.optimizer, muon=MuonConfig())
  muon, _ = costs.state_bytes(
    dataclasses.replace(experiment, optimizer=optimizer), one
  )
  assert adamw - 3 * parameters < 100  # counters
  assert adamw - muon == pytest.approx(4 * weights(), abs=100)


def test_what_fsdp_and_data_exchange_crosses_the_slow_network_once(experiment):
  found = costs.of(with_mesh(experiment, 2, 4, 1), TARGET)
  sent = {(c.name, c.axis): c for c in found.collectives}
  ends = 2 * 48 * 512
  # int8 codes for both passes; float32 gradients.
  assert sent['weights', 'fsdp'].bytes == 2 * weights() * 3 / 4
  assert sent['gradients', 'fsdp'].bytes == 4 * (weights() + ends) * 3 / 4
  gradients = sent['gradients', 'fsdp']
  assert gradients.seconds == pytest.approx(gradients.bytes / 1e9)
  # data's two are in two domains of four: a quarter of them a device.
  summed = sent['gradients', 'data']
  assert summed.bytes == 2 * 4 * (weights() + ends) / 4 / 2
  assert summed.seconds == pytest.approx(summed.bytes / 1e8)
  # All eight in one group: half of it crosses, through four devices at once.
  whole = costs.of(with_mesh(experiment, 1, 8, 1), TARGET).collectives[0]
  assert whole.seconds == pytest.approx(2 * weights() * 4 / 8 / (4 * 1e8))


def test_terms_bound_the_estimate(experiment):
  found = costs.of(experiment, TARGET)
  terms = found.compute, found.reading, found.network
  assert found.least == max(terms) and found.most == sum(terms)
  assert found.least <= found.seconds <= found.most
  assert getattr(found, found.bound) == found.least
  assert costs.mfu(experiment, TARGET, 2.0) == pytest.approx(
    found.model_flops / (8 * 1e12 * 2)
  )


@pytest.mark.parametrize(
  ('sizes', 'words'),
  [
    ((2, 2, 1), 'takes 4 devices, but there are 8'),
    ((16, 1, 1), 'takes 16 devices, but there are 8'),
    ((1, 1, 8), 'mesh.tensor=8 does not divide model.heads=4'),
    ((2, 1, 4), 'mesh.tensor=4 does not divide model.kv_heads=2'),
  ],
)
def test_a_mesh_that_does_not_fit_is_named(experiment, sizes, words):
  with pytest.raises(ValueError, match=words):
    costs.of(with_mesh(experiment, *sizes), TARGET)


def test_a_batch_that_cannot_be_divided_is_named(experiment):
  with pytest.raises(ValueError, match='data.batch_size=8 must be a multiple'):
    costs.of(with_mesh(experiment, 4, 2, 1, accumulation=2), TARGET)
