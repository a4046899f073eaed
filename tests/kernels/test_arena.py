# SPDX-License-Identifier: Apache-2.0
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tritera_kernels import arena as arena_lib


def test_jax_reads_the_same_memory_and_keeps_it():
  shapes = {'a': ((3, 5), np.uint8), 'b': ((7,), np.float32)}
  arena = arena_lib.Arena(arena_lib.aligned(15) + arena_lib.aligned(28))
  views = {name: arena.take(*shape) for name, shape in shapes.items()}
  views['a'][:] = np.arange(15).reshape(3, 5)
  views['b'][:] = 0.5
  addresses = {name: view.ctypes.data for name, view in views.items()}
  assert addresses['a'] % 2**21 == 0
  assert addresses['b'] == addresses['a'] + 64
  with jax.default_device(jax.devices('cpu')[0]):
    arrays = arena_lib.on_device(views)
  for name, array in arrays.items():
    assert array.unsafe_buffer_pointer() == addresses[name]
  del arena, views
  gc.collect()
  # What is mapped next does not land on it.
  others = [arena_lib.Arena(2**21) for _ in range(4)]
  for other in others:
    other.take((2**21,), np.uint8)[:] = 255
  np.testing.assert_array_equal(arrays['a'], np.arange(15).reshape(3, 5))
  doubled = jax.jit(lambda tree: tree['b'] * 2)(arrays)
  np.testing.assert_array_equal(doubled, jnp.ones(7))


def test_an_arena_gives_what_it_has():
  arena = arena_lib.Arena(128)
  arena.take((65,), np.uint8)
  with pytest.raises(ValueError, match='takes 1 bytes, the arena has 0 left'):
    arena.take((1,), np.uint8)
