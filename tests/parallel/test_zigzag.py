# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel import rules, zigzag

HIDDEN = ('batch', 'sequence', None)


def mesh_of(context, **sizes):
  config = mesh_lib.MeshConfig(fsdp=1, context=context, **sizes)
  devices = context * int(np.prod([*sizes.values()], dtype=int))
  return mesh_lib.make_mesh(config, jax.devices()[:devices])


@pytest.mark.parametrize('n', [2, 3, 4, 8])
def test_a_device_has_an_early_and_a_late_chunk(n):
  T = 6 * n
  with jax.set_mesh(mesh_of(n)):
    place = jnp.broadcast_to(jnp.arange(T), (2, T))
    arranged = jax.jit(zigzag.arrange)({'place': place, 'nothing': None})
  assert arranged['nothing'] is None
  work = []
  for shard in arranged['place'].addressable_shards:
    first, second = np.split(np.asarray(shard.data), 2, axis=1)
    i = shard.device.id
    np.testing.assert_array_equal(first[0], 3 * i + np.arange(3))
    np.testing.assert_array_equal(second[0], 3 * (2 * n - 1 - i) + np.arange(3))
    work.append(int((1 + np.asarray(shard.data)).sum()))
  assert len(set(work)) == 1  # keys that its queries see


@pytest.mark.parametrize('n', [2, 3, 8])
def test_what_is_restored_is_in_order_and_so_is_its_gradient(n):
  B, T, D = 2, 4 * n, 3
  rng = np.random.default_rng(n)
  x = rng.standard_normal((B, T, D)).astype(np.float32)
  weight = rng.standard_normal((B, T, D)).astype(np.float32)
  mesh = mesh_of(n)
  with jax.set_mesh(mesh):
    order = np.asarray(zigzag.arrange(jnp.broadcast_to(jnp.arange(T), (B, T))))
    arranged = np.take_along_axis(x, order[..., None], 1)
    placed = jax.device_put(arranged, rules.shardings(mesh, HIDDEN))
    restored = jax.jit(zigzag.restore)
    out = restored(placed)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weight * zigzag.restore(x))))(
      placed
    )
    program = restored.lower(placed).compile().as_text()
  np.testing.assert_array_equal(out, x)
  assert out.sharding.is_equivalent_to(placed.sharding, 3)
  np.testing.assert_array_equal(
    gradient, np.take_along_axis(weight, order[..., None], 1)
  )
  # Half of a device's tokens a hop, and nothing gathered.
  assert f'f32[{B},{T // n // 2},{D}]{{2,1,0}} collective-permute' in program
  assert 'all-gather' not in program


def test_nothing_moves_where_sequences_are_whole():
  x = jnp.ones((2, 5, 3))
  assert zigzag.arrange(x) is x and zigzag.restore(x) is x
  assert zigzag.merged(x).shape == (10, 3)
  with jax.set_mesh(mesh_of(1, data=2)):
    assert zigzag.arrange(x) is x and zigzag.restore(x) is x
  with jax.set_mesh(mesh_of(2)):
    assert zigzag.merged(x) is x


def test_tokens_that_make_no_pairs_of_chunks_are_refused():
  with (
    jax.set_mesh(mesh_of(4)),
    pytest.raises(ValueError, match=r'12 tokens .* mesh\.context=4: .* of 8'),
  ):
    zigzag.arrange(jnp.zeros((1, 12)))
