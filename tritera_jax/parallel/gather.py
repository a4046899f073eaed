# SPDX-License-Identifier: Apache-2.0
"""How the shards of a weight matrix are gathered where they are used.

Under FSDP each device keeps a slice of every matrix, and each pass needs the
whole of it. 'auto' leaves it to XLA what travels: with jax 0.11.2 the codes as
float32 on CPUs, as int8 on GPUs and TPUs, up to three times where blocks are
computed again. The others say it:

  bfloat16   2 bytes a weight: FloatLM's gather, and what 'two_bit' is held
             against
  two_bit    4 codes a byte; they are unpacked on arrival

Quantising comes before and is the same for all: each device quantises its
shard, and the exact mean (`ternary.quantize`) is a sum over the devices, so
that codes, scales and results do not depend on how they travel. A scale is
that sum, and is on every device without being gathered.

What it costs: each device packs its shard and unpacks the whole matrix, twice
for each part of a batch (`run.accumulation`), forwards and backwards. Between
the passes it keeps the packed shard, P / 4n bytes for P weights on n devices,
where 'auto' keeps P / n; it is gathered again. XLA can no longer split a
gather to multiply the parts as they arrive.
"""

import dataclasses
import math
from typing import Literal

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Float32, Int8, Shaped, UInt8
import numpy as np

from tritera_jax.parallel import rules
from tritera_kernels.formats import two_bit

Gather = Literal['auto', 'bfloat16', 'two_bit']

# Devices in a ring. Over more, matrices go round in two stages, the sides of a
# torus: as many bytes, in fewer hops. (Over 256 in one stage, a TPU's compiler
# makes of a gather of some 16 MB or less, and of every reduce-scatter, a sum
# over all of them of twice the bytes.)
RING = 16


@dataclasses.dataclass(frozen=True)
class Exchange:
  """The way of one matrix, whose `dimension` is split over the axes `over`.

  Attributes:
    kind: see the module.
    split: of the matrix as its devices keep it.
    whole: of the matrix where it is used.
    dimension: that is gathered, 0 or 1.
    over: mesh axes.
  """

  kind: Gather
  split: PartitionSpec
  whole: PartitionSpec
  dimension: int
  over: tuple[str, ...]

  def pack(
    self, matrix_KN: Int8[Array, 'K N'] | Float[Array, 'K N']
  ) -> Shaped[Array, 'k n']:
    """What a device keeps and sends of its shard.

    Codes are packed along the dimension that is not gathered, each device's
    share of it to whole bytes.
    """
    if self.kind == 'bfloat16':
      return matrix_KN.astype(jnp.bfloat16)
    return jax.shard_map(
      lambda codes_kn: _bytes(codes_kn, 1 - self.dimension),
      in_specs=self.split,
      out_specs=self.split,
      check_vma=False,  # nothing is differentiated through it
    )(matrix_KN)

  def gather(
    self, packed_kn: Shaped[Array, 'k n'], shape: tuple[int, int]
  ) -> Int8[Array, 'K N'] | Float[Array, 'K N']:
    """The matrix of that shape, whole on each device along `dimension`."""

    def local(packed_kn):
      if self.kind == 'bfloat16':
        # As integers: XLA widens a bfloat16 gather to float32 on CPUs.
        bits_kn = lax.bitcast_convert_type(packed_kn, jnp.uint16)
        bits_Kn = self._all(bits_kn)
        return lax.bitcast_convert_type(bits_Kn, jnp.bfloat16)
      return _codes(self._all(packed_kn), 1 - self.dimension, length)

    length = shape[1 - self.dimension]
    split_over = self.whole[1 - self.dimension]
    if split_over is not None:
      sizes = jax.sharding.get_abstract_mesh().shape
      for axis in _names(split_over):
        length //= sizes[axis]
    return jax.shard_map(
      local, in_specs=self.split, out_specs=self.whole, check_vma=False
    )(packed_kn)

  def product(
    self, x: Float[Array, '*tokens K'], g: Float[Array, '*tokens N']
  ) -> Float32[Array, 'K N']:
    """x^T g, the matrix's gradient, summed over tokens into its shards.

    It says that the sum is scattered: XLA sums the whole on every device,
    which is twice the traffic, where it has no reduce-scatter (CPUs) or where
    shards are no multiple of its tiles (TPUs).
    """
    dimensions = tuple(range(x.ndim - 1))
    tokens = ('batch', 'sequence')[: x.ndim - 1]
    sizes = jax.sharding.get_abstract_mesh().shape
    rest = tuple(
      name
      for axis in rules.spec(tokens)
      for name in _names(axis)
      if name not in self.over and sizes[name] > 1
    )

    def local(x, g):
      dw_KN = lax.dot_general(
        x,
        g,
        ((dimensions, dimensions), ((), ())),
        preferred_element_type=jnp.float32,
      )
      for axis, groups in reversed(_stages(self.over)):
        dw_KN = lax.psum_scatter(
          dw_KN,
          axis,
          scatter_dimension=self.dimension,
          axis_index_groups=groups,
          tiled=True,
        )
      return lax.psum(dw_KN, rest) if rest else dw_KN

    return jax.shard_map(
      local,
      in_specs=tuple(
        PartitionSpec(*rules.spec(tokens), axis) for axis in self.whole
      ),
      out_specs=self.split,
      check_vma=False,
    )(x, g)

  def _all(self, shard_kn):
    for axis, groups in _stages(self.over):
      shard_kn = lax.all_gather(
        shard_kn,
        axis,
        axis=self.dimension,
        axis_index_groups=groups,
        tiled=True,
      )
    return shard_kn


def exchange(kind: Gather, axes: tuple[str, str]) -> Exchange | None:
  """The way of a matrix with these logical axes; None: XLA's.

  It is XLA's too where there is no mesh, or one that does not split it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if kind == 'auto' or mesh.empty:
    return None
  split = rules.spec(axes)
  dimension = axes.index('embed')
  over = _names(split[dimension])
  if all(mesh.shape[axis] == 1 for axis in over):
    return None
  whole = rules.spec(tuple(axis if axis != 'embed' else None for axis in axes))
  return Exchange(kind, split, whole, dimension, over)


def _names(entry) -> tuple[str, ...]:
  """The mesh axes of one entry of a PartitionSpec."""
  return entry if isinstance(entry, tuple) else (entry,) if entry else ()


def _stages(
  over: tuple[str, ...],
) -> list[tuple[str, list[list[int]] | None]]:
  """(mesh axis, groups of its devices) of the gathers one after the other."""
  sizes = jax.sharding.get_abstract_mesh().shape
  stages = []
  for axis in reversed(over):  # neighbours' shards join first
    n = sizes[axis]
    outer = 1
    if n > RING:
      outer = max(a for a in range(1, math.isqrt(n) + 1) if n % a == 0)
    if outer == 1:
      stages.append((axis, None))
      continue
    number = np.arange(n).reshape(outer, -1)
    stages += [(axis, number.tolist()), (axis, number.T.tolist())]
  return stages


def _bytes(
  codes_kn: Int8[Array, 'k n'], axis: int
) -> UInt8[Array, 'k_bytes n_bytes']:
  """Packed planes of a shard along `axis`, padded with zeros to fill them."""
  missing = -codes_kn.shape[axis] % two_bit.CODES_PER_BYTE
  padding = [(0, missing if axis == n else 0) for n in range(2)]
  planes = jnp.split(jnp.pad(codes_kn, padding), two_bit.CODES_PER_BYTE, axis)
  return two_bit.pack_planes(jnp.stack(planes).astype(jnp.int32) + 1)


def _codes(
  packed_kn: UInt8[Array, 'k_bytes n_bytes'], axis: int, length: int
) -> Int8[Array, 'k n']:
  """The `length` codes along `axis` that `_bytes` packed."""
  planes = [plane.astype(jnp.int8) for plane in two_bit.decode_tile(packed_kn)]
  return lax.slice_in_dim(jnp.concatenate(planes, axis), 0, length, axis=axis)
