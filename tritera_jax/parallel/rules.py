# SPDX-License-Identifier: Apache-2.0
"""Logical axes of arrays onto mesh axes.

A parameter names what each of its dimensions is ('embed', 'mlp', ...); this
table says which mesh axes split it. Dimensions that no rule names, and every
dimension when there is no mesh, stay whole.
"""

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import math

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, Shaped
import numpy as np

RULES: dict[str, str | tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'sequence': 'context',
  # Devices that share a sequence would else hold the same weights, and sum
  # their gradients over context where they now scatter them.
  'embed': ('fsdp', 'context'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes.

  Inside `without`, of the mesh axes that are left.

  Raises:
    ValueError: two dimensions would be split over the same mesh axis.
  """
  entries = [RULES.get(axis) if axis else None for axis in axes]
  used = [
    name
    for entry in entries
    if entry
    for name in (entry if isinstance(entry, tuple) else (entry,))
  ]
  if len(used) != len(set(used)):
    raise ValueError(
      f'logical axes {axes} map to {entries}: one mesh axis cannot split two '
      'dimensions'
    )
  taken = _taken.get()
  return PartitionSpec(*(_left(entry, taken) for entry in entries))


_taken: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
  'taken', default=frozenset()
)


@contextlib.contextmanager
def without(*axes: str) -> Iterator[None]:
  """What is traced in the block is split over the other mesh axes only.

  For the body of a jax.vmap whose mapped axis lies on these.
  """
  token = _taken.set(_taken.get() | set(axes))
  try:
    yield
  finally:
    _taken.reset(token)


def _left(entry: str | tuple[str, ...] | None, taken: frozenset[str]):
  if isinstance(entry, str):
    return None if entry in taken else entry
  return entry and tuple(axis for axis in entry if axis not in taken)


def splits(axis: str | None) -> tuple[str, ...]:
  """The axes, larger than 1, of the mesh in use that split a logical axis."""
  mesh = jax.sharding.get_abstract_mesh()
  names = () if mesh.empty else spec((axis,))[0] or ()
  names = (names,) if isinstance(names, str) else names
  return tuple(name for name in names if mesh.shape[name] > 1)


def divisor(*axes: str | None) -> int:
  """Into how many parts the mesh in use splits these logical axes."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[name] for axis in axes for name in splits(axis))


def shardings(
  mesh: Mesh | AbstractMesh, logical_axes: PyTree
) -> PyTree[NamedSharding]:
  """A NamedSharding for each tuple of logical axes in the tree."""
  return jax.tree.map(
    lambda axes: NamedSharding(mesh, spec(axes)),
    logical_axes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def rows_here(sharding: NamedSharding, shape: Sequence[int]) -> slice:
  """The rows of an array from this process's first to its last.

  Args:
    sharding: of the array.
    shape: of the whole array.
  """
  indices = sharding.addressable_devices_indices_map(tuple(shape)).values()
  rows = [index[0].indices(shape[0]) for index in indices if index]
  return slice(min(row[0] for row in rows), max(row[1] for row in rows))


def assemble(
  sharding: NamedSharding,
  rows: slice,
  here_bT: Shaped[np.ndarray, 'b T'],
  count: int,
) -> Shaped[Array, 'B T']:
  """The array over all processes, of the rows that each one has.

  Args:
    sharding: of the array.
    rows: those of `here_bT`, by `rows_here`.
    here_bT: the rows.
    count: of rows in all, B.
  """

  def part(index):
    first, last, _ = index[0].indices(count)
    return here_bT[first - rows.start : last - rows.start, index[1]]

  shape = (count, *here_bT.shape[1:])
  return jax.make_array_from_callback(shape, sharding, part)


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
  """Pins x's sharding inside jit; nothing without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))
