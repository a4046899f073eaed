# SPDX-License-Identifier: Apache-2.0
"""A hash of arrays' bits that is the same however a mesh splits them.

Each element's bits and its place are mixed, and integers summed, whose order
does not matter. The mixing is murmur3's last step (Appleby): one to one, so
that a change of one element always shows, and not linear, so that changes of
several do not cancel as two flipped signs would in a weighted sum.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree, UInt32
import numpy as np

_CHAIN = 1664525


def digest(tree: PyTree) -> UInt32[Array, '']:
  """Of all leaves, in order; each element of at most 32 bits."""
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    bits = jax.lax.bitcast_convert_type(
      leaf, jnp.dtype(f'uint{8 * leaf.dtype.itemsize}')
    ).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, length in enumerate(leaf.shape):
      along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      place = place * jnp.uint32(length) + along
    # Added to 1, so that zeros at place 0 are not left as they are.
    mixed = _mixed(bits ^ _mixed(place + jnp.uint32(1)))
    total = chained(total, jnp.sum(mixed, dtype=jnp.uint32))
  return total


def digest_on_disk(tree: PyTree[np.ndarray], piece: int = 1 << 22) -> int:
  """`digest` of arrays that lie on disk, `piece` elements at a time."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    flat = leaf.reshape(-1).view(f'uint{8 * leaf.dtype.itemsize}')
    of_leaf = 0
    for first in range(0, flat.size, piece):
      bits = flat[first : first + piece].astype(np.uint32)
      # Places count modulo 2^32.
      place = np.arange(first, first + bits.size, dtype=np.uint64)
      mixed = _mixed(bits ^ _mixed(place.astype(np.uint32) + np.uint32(1)))
      of_leaf += int(np.sum(mixed, dtype=np.uint64))
    total = (total * _CHAIN + of_leaf) % 2**32
  return total


def chained(
  before: UInt32[Array, ''], after: UInt32[Array, '']
) -> UInt32[Array, '']:
  """Of two digests one that depends on their order."""
  return before * jnp.uint32(_CHAIN) + after


def _mixed(x):
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
