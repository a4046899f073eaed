# SPDX-License-Identifier: Apache-2.0
"""Five trits a byte, 1.6 bits a code (Spectra-1.1's TQ1; Theorem 1).

Byte p of a row of K codes holds codes p, P + p, ..., 4P + p, where
P = ceil(K / 5): planes, as in `two_bit`. With digits code + 1, plane 0 the
most significant, v = sum_j digit_j 3^(4-j) in 0..242 is stored as the
fixed-point fraction ceil(256 v / 243), so that each digit falls out as the
carry of a multiplication by 3: no division. Codes past K are 0.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, UInt8
import numpy as np

NAME = 'base_three'
LAYOUT_VERSION = 1
CODES_PER_BYTE = 5


def pack_planes(
  planes: Int32[Array, 'five *rows P'],
) -> UInt8[Array, '*rows P']:
  """Bytes of codes + 1, plane by plane."""
  value = jnp.zeros(planes.shape[1:], jnp.int32)
  for digit in planes:
    value = 3 * value + digit
  return ((256 * value + 242) // 243).astype(jnp.uint8)


def decode_tile(
  packed: UInt8[Array, '*tile'],
) -> tuple[Int32[Array, '*tile'], ...]:
  """The codes of each plane; multiplications by 3, shifts and masks."""
  rest = packed.astype(jnp.int32)
  planes = []
  for _ in range(CODES_PER_BYTE):
    rest = rest * 3
    planes.append((rest >> 8) - 1)
    rest &= 0xFF
  return tuple(planes)


_VALID = np.zeros(256, bool)
_VALID[(256 * np.arange(243) + 242) // 243] = True


def is_valid(packed: UInt8[Array, '*tile']) -> Bool[Array, '*tile']:
  """False where no five trits give a byte."""
  return jnp.asarray(_VALID)[packed]
