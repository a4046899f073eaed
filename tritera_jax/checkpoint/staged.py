# SPDX-License-Identifier: Apache-2.0
"""Arrays on disk that are saved as if they lay in memory.

A checkpoint's leaves are stacked over layers, and one of them alone may be
larger than memory. Here each is a memory-mapped file, written layer by layer,
which `save` hashes and writes piece by piece.
"""

from pathlib import Path

import jax
from jaxtyping import PyTree
import numpy as np
import orbax.checkpoint as ocp

_CHUNK_BYTES = 1 << 26  # of an array in a checkpoint's files


class StagedArray(np.memmap):
  """An array in a file of its own, which nobody writes while it is saved."""

  def __deepcopy__(self, memo) -> np.ndarray:
    # Orbax copies arrays of the host, in case that they change meanwhile.
    del memo
    return self


def empty(
  tree: PyTree[jax.ShapeDtypeStruct], folder: Path
) -> PyTree[StagedArray]:
  """Arrays of zeros in files of a folder, to be filled."""
  leaves, treedef = jax.tree.flatten(tree)
  return treedef.unflatten(
    [
      StagedArray(folder / str(n), leaf.dtype, 'w+', shape=leaf.shape)
      for n, leaf in enumerate(leaves)
    ]
  )


def is_staged(tree: PyTree) -> bool:
  return any(isinstance(leaf, StagedArray) for leaf in jax.tree.leaves(tree))


def save_args(tree: PyTree) -> PyTree | None:
  """Has Orbax write a staged tree chunk by chunk; None: as it would anyway."""
  if not is_staged(tree):
    return None
  return jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree
  )
