# SPDX-License-Identifier: Apache-2.0
"""One hash for codes and scales, whatever holds them.

For each matrix, SHA-256 over these bytes, one after another:

  the name in UTF-8, a zero byte,
  N, K, number of scale blocks, each as 8 bytes little-endian,
  one byte: 0 if blocks lie along outputs, 1 along inputs (0 for one block),
  the codes as int8, row by row: N rows of K,
  the scales as float32, little-endian.

The model's fingerprint is SHA-256 over those 32-byte digests in the order of
the names' UTF-8 bytes, in hex after 'trits1:'.
"""

from collections.abc import Iterable
import hashlib

from jaxtyping import Array, Float32, Int8
import numpy as np

PREFIX = 'trits1:'


def matrix_digest(
  name: str,
  codes_NK: Int8[Array | np.ndarray, 'N K'],
  scale: Float32[Array | np.ndarray, ' blocks'],
  scale_axis: str,
) -> bytes:
  """SHA-256 of one matrix."""
  N, K = codes_NK.shape
  blocks = scale.shape[0]
  digest = hashlib.sha256(name.encode() + b'\0')
  for number in (N, K, blocks):
    digest.update(number.to_bytes(8, 'little'))
  digest.update(bytes([scale_axis == 'in' and blocks > 1]))
  digest.update(np.ascontiguousarray(codes_NK, np.int8))
  digest.update(np.ascontiguousarray(scale, '<f4'))
  return digest.digest()


def trit_fingerprint(
  matrices: Iterable[tuple[str, Array | np.ndarray, Array | np.ndarray, str]],
) -> str:
  """Fingerprint of (name, codes [N, K], scale, scale_axis) in any order.

  Raises:
    ValueError: two matrices have one name.
  """
  digests = {}
  for name, codes_NK, scale, scale_axis in matrices:
    if name in digests:
      raise ValueError(f'two matrices are called {name!r}')
    digests[name] = matrix_digest(name, codes_NK, scale, scale_axis)
  whole = hashlib.sha256()
  for name in sorted(digests, key=str.encode):
    whole.update(digests[name])
  return PREFIX + whole.hexdigest()
