# SPDX-License-Identifier: Apache-2.0
"""The device mesh: axes data, fsdp and tensor."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

AXES = ('data', 'fsdp', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 on one axis takes what is left.

  Attributes:
    data: copies of the model, each with its share of the batch.
    fsdp: devices that share parameters, optimizer state and batch.
    tensor: devices that split heads, the MLP and the vocabulary.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
  """A mesh over `devices` (default: all).

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dataclasses.astuple(config)
  free = [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
  fixed = math.prod(size for size in sizes if size != -1)
  if len(free) > 1:
    raise ValueError(f'mesh: only one of {", ".join(free)} may be -1')
  if any(size == 0 or size < -1 for size in sizes):
    raise ValueError(f'mesh: {config} has an axis that is neither >= 1 nor -1')
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise ValueError(
      f'mesh: {config} takes {"a multiple of " if free else ""}{fixed} '
      f'devices, but there are {len(devices)}; change the axis sizes'
    )
  sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
  return jax.make_mesh(
    sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES)
  )
