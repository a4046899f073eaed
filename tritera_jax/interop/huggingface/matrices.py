# SPDX-License-Identifier: Apache-2.0
"""Ternary matrices as checkpoints from outside hold them, to codes and scales.

Shapes: N outputs, K inputs, as in Hugging Face's `weight`; S scale blocks.
"""

from jaxtyping import Float, Float32, Int8, UInt8
import numpy as np

from tritera_jax.ternary.quantize import ScaleAxis

_PIECE = 1 << 22  # elements looked at together


class NotTernaryError(ValueError):
  """A block has more than one magnitude beside 0."""


def unpack(packed_nK: UInt8[np.ndarray, 'n K'], name: str) -> Int8[
  np.ndarray, 'N K'
]:  # fmt: skip
  """Codes of transformers' `integrations/bitnet.py`: four outputs a byte.

  Byte row r of N / 4 holds the outputs r, r + N/4, r + N/2, r + 3N/4, from its
  lowest two bits up, each code plus 1.

  Raises:
    ValueError: a code is 3: its place is named.
  """
  n, K = packed_nK.shape
  codes_NK = np.empty((4 * n, K), np.int8)
  for part in range(4):
    codes_nK = codes_NK[part * n : (part + 1) * n]
    np.bitwise_and(packed_nK >> (2 * part), 3, out=codes_nK, casting='unsafe')
    codes_nK -= 1
  if codes_NK.max(initial=-1) > 1:
    row, column = np.argwhere(codes_NK > 1)[0]
    raise ValueError(
      f'{name}: the code of output {row}, input {column} is 3; packed bytes '
      'hold 0, 1 or 2: the file is damaged, or packed in another way'
    )
  return codes_NK


def ternary_of(
  values_NK: Float[np.ndarray, 'N K'], blocks: int, axis: ScaleAxis, name: str
) -> tuple[Int8[np.ndarray, 'N K'], Float32[np.ndarray, ' S']]:
  """Codes and scales of values that are -s, 0 or s, with an s for each block.

  A block of zeros gets scale 0.

  Args:
    values_NK: of any float dtype, or integers.
    blocks: S.
    axis: along which they lie.
    name: of the tensor, for errors.

  Raises:
    NotTernaryError: a block has more magnitudes: tensor, index and values are
      named.
    ValueError: a value is NaN or infinite.
  """
  check_finite(values_NK, name)
  codes_NK = np.sign(values_NK).astype(np.int8)
  split = {'out': 0, 'in': 1}[axis]
  scale_S = np.zeros(blocks, np.float32)
  for block, part in enumerate(np.split(values_NK, blocks, split)):
    size = np.abs(part)
    scale = size.max(initial=0)
    scale_S[block] = scale
    if ((size != scale) & (size != 0)).any():
      # The odd one out is not always the smaller one.
      found, counts = np.unique(size[size != 0], return_counts=True)
      scale = found[counts.argmax()]
      place = np.argwhere((size != scale) & (size != 0))[0]
      value = part[tuple(place)]
      place[split] += block * part.shape[split]
      raise NotTernaryError(
        f'{name}: its values are not ternary: {value} at {place.tolist()} is '
        f'neither 0 nor {scale} nor {-scale}, with {blocks} scale'
        f'{"s" * (blocks > 1)} a matrix (pretraining_model_parallel of '
        "config.json); weights='float' takes values as they are"
      )
  return codes_NK, scale_S


def check_finite(values: np.ndarray, name: str):
  """Refuses NaN and infinities, of float32 too.

  Raises:
    ValueError: there is one: tensor, index and value are named.
  """
  if values.dtype.kind in 'iu':
    return
  flat = values.reshape(-1)
  for first in range(0, flat.size, _PIECE):
    with np.errstate(over='ignore'):
      finite = np.isfinite(flat[first : first + _PIECE].astype(np.float32))
    if not finite.all():
      at = first + int(np.argmin(finite))
      place = [int(i) for i in np.unravel_index(at, values.shape)]
      raise ValueError(
        f'{name}: the value at {place} is {flat[at]}; a checkpoint with NaN or '
        'infinities is of no use'
      )
