# SPDX-License-Identifier: Apache-2.0
"""Logical axes of arrays onto mesh axes.

A parameter names what each of its dimensions is ('embed', 'mlp', ...); this
table says which mesh axes split it. Dimensions that no rule names, and every
dimension when there is no mesh, stay whole.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

RULES: dict[str, str | tuple[str, ...]] = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes.

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
  return PartitionSpec(*entries)


def shardings(mesh: Mesh, logical_axes: PyTree) -> PyTree[NamedSharding]:
  """A NamedSharding for each tuple of logical axes in the tree."""
  return jax.tree.map(
    lambda axes: NamedSharding(mesh, spec(axes)),
    logical_axes,
    is_leaf=lambda leaf: isinstance(leaf, tuple),
  )


def constrain(x: Array, axes: tuple[str | None, ...]) -> Array:
  """Pins x's sharding inside jit; nothing without a mesh."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))
