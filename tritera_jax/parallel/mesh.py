# SPDX-License-Identifier: Apache-2.0
"""The device mesh: its axes, inside and across hosts.

Why no pipeline axis. Of p stages with m sequences in flight each idles for
(p - 1) / (m + p - 1) of a step. Devices that have t tokens of a step each make
m = p t / T sequences of T tokens a pipeline of p, so that its bubble adds
C (p - 1) T / (p t) to the C seconds of work. It saves exchange: a device
reduces the gradients of P / p parameters, not P, which is N (p - 1) / p of N
seconds. So it pays where

  N / C > T / t, even if none of N is hidden behind the backward pass.

Estimates, nothing here is measured: TriLM 3.9B (3.68e9 weights in matrices of
3.99e9, 24.1 GFLOPs a token) at 2^20 tokens a step on 2,048 devices: t = 512,
T / t = 4. C is at half the peak. Gathers are twice a step, gradients float32,
over the fast network (8 devices; 256 of a v5e): 14.7 GB in bfloat16, 1.8 GB in
2 bits, 16 GB of gradients, a share tensor = 8 makes 3.8 GB in all and 5.3 GB
of activations. N is between hosts or slices: 8 bytes x P / 8 (or 256).

  ms          GB/s fast, slow     C   gather 16, 2 bits   scatter     N  N / C
  H100             450,  50      25       33,   4             35     80    3.2
  MI250X (die)      50,  12.5   129      294,  37            319    319    2.5
  TPU v5e          100,   3.1   126      147,  18            160     40    0.3

It pays in no row. Interleaving v groups of layers a stage lowers T / t by v:
on the H100s four stages of v = 7 (the 30 layers do not even divide) would take
36 + 20 ms against 25 + 80. But so little work a device wants less exchange
whatever the layout, and what halves N (bfloat16 gradients, twice the batch) or
sends it every hundredth step (an outer loop) has no bubble and no second
program. Nor does memory ask for stages: the 64 GB of training state are 8 GB
a device of eight. It would for a model that these eight cannot hold.
"""

import collections
from collections.abc import Sequence
import dataclasses
import math
from typing import Any, Literal

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

# The last lie closest together: tensor parallelism waits for each exchange.
AXES = ('data', 'fsdp', 'context', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 on one axis takes what is left.

  Attributes:
    data: copies of the model, each with its share of the batch.
    fsdp: devices that share parameters, optimizer state and batch.
    tensor: devices that split heads, the MLP and the vocabulary.
    context: devices that share each sequence, and parameters and optimizer
      state as those of fsdp do.
    across: axes that may span the slow network between TPU slices, or between
      hosts; the first takes as much of it as its size allows, the next what is
      left. All others stay inside a slice or host. Empty: JAX's own order.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1
  context: int = 1
  across: tuple[Literal['data', 'fsdp', 'context', 'tensor'], ...] = ()

  def __post_init__(self):
    if len(self.across) != len(set(self.across)):
      raise ValueError(
        f'mesh.across={" ".join(self.across)} names an axis twice; name each '
        'once'
      )


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
  """Devices along each axis of a mesh over so many.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  sizes = {axis: getattr(config, axis) for axis in AXES}
  free = [axis for axis, size in sizes.items() if size == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1:
    raise ValueError(f'mesh: only one of {", ".join(free)} may be -1')
  if any(size == 0 or size < -1 for size in sizes.values()):
    raise ValueError(f'mesh: {config} has an axis that is neither >= 1 nor -1')
  if devices % fixed or (not free and fixed != devices):
    raise ValueError(
      f'mesh: {config} takes {"a multiple of " if free else ""}{fixed} '
      f'devices, but there are {devices}; change the axis sizes'
    )
  return {
    axis: devices // fixed if size == -1 else size
    for axis, size in sizes.items()
  }


def sizes_across(
  config: MeshConfig, devices: int, hosts: int
) -> dict[str, int]:
  """Of each axis, the factor that spans the network between hosts (or slices).

  Raises:
    ValueError: the axes of `mesh.across` do not multiply to a multiple of the
      hosts, or the mesh does not fit the devices.
  """
  sizes = axis_sizes(config, devices)
  across: dict[str, int] = dict.fromkeys(AXES, 1)
  left = hosts
  for axis in config.across:
    across[axis] = math.gcd(sizes[axis], left)
    left //= across[axis]
  if left > 1:
    product = ' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in config.across)
    raise ValueError(
      f'mesh.across={" ".join(config.across)}: {product} is no multiple of the '
      f'{hosts} hosts (or TPU slices) that it has to span; change the sizes or '
      'name another axis too'
    )
  return across


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over `devices` (default: all).

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or those
      of `mesh.across` not to the hosts.
  """
  devices = jax.devices() if devices is None else devices
  types = (AxisType.Auto,) * len(AXES)
  if config.across:
    return Mesh(hybrid(config, devices), AXES, axis_types=types)
  sizes = tuple(axis_sizes(config, len(devices)).values())
  return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)


def hybrid(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
  """The devices in the mesh's shape, with only `across` between hosts.

  Raises:
    ValueError: see `make_mesh`.
  """
  # A slice is what a fast network joins: on TPUs over hosts, on GPUs a host
  # or an NVLink domain. Where a platform has no such word, it is a process.
  by_process = not hasattr(devices[0], 'slice_index')
  attribute = 'process_index' if by_process else 'slice_index'
  counts = collections.Counter(getattr(d, attribute) for d in devices)
  if len(set(counts.values())) > 1:
    raise ValueError(
      f'mesh.across={" ".join(config.across)} needs as many devices in each '
      f'{attribute}, but there are {dict(sorted(counts.items()))}; leave out '
      'the odd hosts'
    )
  sizes = axis_sizes(config, len(devices))
  across = sizes_across(config, len(devices), len(counts))
  return mesh_utils.create_hybrid_device_mesh(
    [sizes[axis] // across[axis] for axis in AXES],
    [across[axis] for axis in AXES],
    devices,
    process_is_granule=by_process,
  )
