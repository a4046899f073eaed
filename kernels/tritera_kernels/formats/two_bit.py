# SPDX-License-Identifier: Apache-2.0
"""Two bits a code: code + 1 in bits 2j, 2j+1 of a byte, for plane j.

Byte p of a row of K codes holds codes p, P + p, 2P + p and 3P + p, where
P = ceil(K / 4): plane j is the contiguous slice [jP, (j + 1)P), so a vector
of bytes, shifted and masked, meets a contiguous slice of the input. Codes
past K are 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt8

NAME = 'two_bit'
LAYOUT_VERSION = 1
CODES_PER_BYTE = 4


def pack_planes(
  planes: Int32[Array, 'four *rows P'],
) -> UInt8[Array, '*rows P']:
  """Bytes of codes + 1, plane by plane."""
  shift = 2 * jnp.arange(CODES_PER_BYTE).reshape(-1, *[1] * (planes.ndim - 1))
  return jnp.sum(planes << shift, axis=0).astype(jnp.uint8)


def decode_tile(
  packed: UInt8[Array, '*tile'],
) -> tuple[Int32[Array, '*tile'], ...]:
  """The codes of each plane; nothing but shifts, masks and int32."""
  byte = packed.astype(jnp.int32)
  return tuple(((byte >> 2 * j) & 3) - 1 for j in range(CODES_PER_BYTE))


def is_valid(packed: UInt8[Array, '*tile']) -> Bool[Array, '*tile']:
  """False where a byte holds the bit pair 3, which is no code."""
  return (packed & (packed >> 1) & 0x55) == 0
