# SPDX-License-Identifier: Apache-2.0
"""A packed matrix over several devices, whatever kernel multiplies.

XLA gathers what a custom call reads, so each device calls for its own part,
under `jax.shard_map`:

  matrix, specs = sharding.partition(matrix, 'tensor', 8, along='out')
  multiply = functools.partial(
    sharding.ternary_matmul, axis='tensor', along='out', activations='float'
  )
  y = jax.shard_map(multiply, mesh=mesh, in_specs=(P(), specs),
                    out_specs=P(None, 'tensor'), check_vma=False)(x, matrix)

Along 'out' each device has some outputs (column-parallel). Along 'in' it has
some inputs, takes those of x, and the products are added (row-parallel).
A norm of those inputs (`LayerWeights.o_gain`, `down_gain`) wants whole tokens,
which a device that has some inputs has not.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from tritera_kernels import packed as packed_lib
from tritera_kernels.matmul import api
from tritera_kernels.packed import PackedTernary

Along = Literal['out', 'in']


def partition(
  packed: PackedTernary, axis: str, shards: int, *, along: Along
) -> tuple[PackedTernary, PackedTernary]:
  """The same matrix, fit to be split, and a PartitionSpec for each array.

  Scales are repeated until blocks and parts fit. Parts along inputs must be
  segments of the row: where they are not, the row is packed anew.

  Args:
    packed: the matrix; traceable.
    axis: of the mesh.
    shards: devices along that axis.
    along: which dimension of the matrix is split.

  Raises:
    ValueError: the devices do not divide it, or inputs would be split across
      several scale blocks along outputs.
  """
  length = packed.shape[0 if along == 'out' else 1]
  if length % shards:
    raise ValueError(
      f'{shards} devices do not divide the {along} axis of a matrix of shape '
      f'{packed.shape} (N, K)'
    )
  blocks = math.lcm(packed.blocks, shards)
  if along == 'out':
    if packed.scale_axis == 'in' or packed.blocks == 1:
      scale_spec = P()
    else:
      scale = jnp.repeat(packed.scale, blocks // packed.blocks)
      packed, scale_spec = dataclasses.replace(packed, scale=scale), P(axis)
    return packed, dataclasses.replace(
      packed, data=P(axis, None), scale=scale_spec
    )
  if packed.scale_axis == 'out' and packed.blocks > 1:
    raise ValueError(
      f'a matrix with {packed.blocks} scale blocks along outputs is not split '
      "along inputs; use along='out'"
    )
  if packed.scale_axis == 'out' or packed.blocks % shards:
    codes, scale = packed_lib.unpack(packed)
    packed = packed_lib.pack(
      codes,
      jnp.repeat(scale, blocks // packed.blocks),
      format=packed.format,
      scale_axis='in',
    )
  return packed, dataclasses.replace(packed, data=P(None, axis), scale=P(axis))


def ternary_matmul(
  x: Shaped[Array, '*batch k'],
  packed: PackedTernary,
  *,
  axis: str,
  along: Along,
  activations: str,
  implementation: str | None = None,
) -> Float[Array, '*batch n']:
  """`matmul.ternary_matmul` of this device's part, inside `jax.shard_map`.

  Args:
    x: all inputs; along 'in' those of this device.
    packed: this device's part of what `partition` made, as shard_map hands
      it over.
    axis: of the mesh.
    along: as given to `partition`.
    activations: as of `ternary_matmul`; int8 along 'out' alone, as its one
      scale a token belongs to all inputs.
    implementation: as of `ternary_matmul`.

  Returns:
    This device's outputs; along 'in' all of them, on each device.

  Raises:
    ValueError: int8 along 'in', or as of `ternary_matmul`.
  """
  if along == 'in' and activations == 'int8':
    raise ValueError(
      "activations='int8' have one scale a token, and along='in' no device "
      "has all of a token; gather x and split the matrix along='out'"
    )
  shards = jax.lax.axis_size(axis)
  N, K = packed.shape
  shape = (N // shards, K) if along == 'out' else (N, K // shards)
  y = api.ternary_matmul(
    x,
    dataclasses.replace(packed, shape=shape),
    activations=activations,
    implementation=implementation,
  )
  return y if along == 'out' else jax.lax.psum(y, axis)
