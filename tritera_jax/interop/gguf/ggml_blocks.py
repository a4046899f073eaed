# SPDX-License-Identifier: Apache-2.0
"""ggml's ternary blocks: TQ1_0, TQ2_0 and Q2_0, from codes and scales and back.

A row of K weights is K / `weights` blocks, one after another. With t = code + 1
in {0, 1, 2}, the blocks of ggml (llama.cpp 01243c5, ggml/src/ggml-common.h and
ggml-quants.c) are, byte by byte:

  tq1_0  48 bytes: five weights a byte. Byte m < 32 holds 32 n + m for n in
         0..4, byte 32 + m (m < 16) holds 160 + 16 n + m: ceil(256 v / 243),
         where v has the digits t in base 3, the first most significant.
         4 bytes: byte m holds 240 + 4 n + m for n in 0..3, and a fifth digit 0.
         2 bytes: the scale.
  tq2_0  64 bytes: byte 32 g + m (g < 2, m < 32) holds t of 128 g + 32 n + m at
         bit 2 n.
         2 bytes: the scale.
  q2_0   2 bytes: the scale.
         16 bytes: byte m holds t of 4 m + n at bit 2 n.

Scales are float16, little-endian. A block without a code other than 0 has the
scale 0, as ggml's own quantisers write it.

Shapes: N outputs, K inputs, S scale blocks of the matrix, B = K / `weights`
blocks of ggml a row.
"""

from typing import Literal, NamedTuple, get_args

from jaxtyping import Float, Float16, Float32, Int8, UInt8
import numpy as np

from tritera_jax.ternary.quantize import ScaleAxis

BlockType = Literal['tq1_0', 'tq2_0', 'q2_0']
BLOCK_TYPES: tuple[BlockType, ...] = get_args(BlockType)


class Layout(NamedTuple):
  """How many weights a block of how many bytes holds; `id` is ggml's."""

  id: int
  weights: int
  bytes: int


LAYOUTS: dict[str, Layout] = {
  'tq1_0': Layout(34, 256, 54),
  'tq2_0': Layout(35, 256, 66),
  'q2_0': Layout(42, 64, 18),
}

# Of tq1_0: weights from, to, in bytes from, that many of them.
_STRIDES = ((0, 160, 0, 32), (160, 240, 32, 16), (240, 256, 48, 4))
_POWERS = (81, 27, 9, 3, 1)
_VALUES = np.arange(256) * 243 // 256
# The five codes of each byte of tq1_0; 13 of 256 bytes are no number's.
_DIGITS = (_VALUES[:, None] // np.array(_POWERS) % 3 - 1).astype(np.int8)
_FIVES = np.arange(256) == -(-256 * _VALUES // 243)
_FOURS = _FIVES & (_VALUES % 3 == 0)


def row_bytes(type: BlockType, K: int) -> int:
  """Bytes of a row of K weights.

  Raises:
    ValueError: K is no whole number of blocks.
  """
  layout = LAYOUTS[type]
  if K % layout.weights:
    raise ValueError(
      f'{type} has blocks of {layout.weights} weights, and {K} inputs are no '
      'whole number of them'
    )
  return K // layout.weights * layout.bytes


class HalfScales(NamedTuple):
  """Scales in float16, and by what share of itself one changed at most."""

  values: Float16[np.ndarray, ' S']
  change: float


def half_scales(scale_S: Float32[np.ndarray, ' S']) -> HalfScales:
  """Rounds scales to float16, to nearest; `change` is 0 where all are exact.

  Raises:
    ValueError: a scale is negative, NaN or infinite, or float16 has nothing
      near it.
  """
  scale_S = np.asarray(scale_S, np.float32)
  with np.errstate(over='ignore', under='ignore'):
    half_S = scale_S.astype(np.float16)
  for scale, half in zip(scale_S.tolist(), half_S.tolist(), strict=True):
    if not (np.isfinite(half) and scale >= 0 and (half > 0 or scale == 0)):
      raise ValueError(
        f'scale {scale} has no float16, which goes from 6e-8 to 65504'
      )
  away_S = np.abs(half_S.astype(np.float64) - scale_S)
  return HalfScales(
    half_S,
    float(np.max(away_S / np.where(scale_S > 0, scale_S, 1), initial=0)),
  )


def spread_scales(
  type: BlockType,
  shape: tuple[int, int],
  scale_S: Float[np.ndarray, ' S'],
  axis: ScaleAxis,
) -> Float[np.ndarray, 'N B']:
  """The scale of each block of a matrix [N, K]; a view, no copy.

  Raises:
    ValueError: K is no whole number of blocks, or a block would straddle two
      of the matrix's scales.
  """
  N, K = shape
  row_bytes(type, K)
  width = LAYOUTS[type].weights
  S = len(scale_S)
  if axis == 'out':
    return np.broadcast_to(np.repeat(scale_S, N // S)[:, None], (N, K // width))
  if K // S % width:
    raise ValueError(
      f'a scale is of {K // S} of {K} inputs, and a block of {type} of '
      f'{width}: some block would need two scales'
    )
  return np.broadcast_to(np.repeat(scale_S, K // S // width), (N, K // width))


def gathered_scales(
  blocks_NB: Float16[np.ndarray, 'N B'], S: int, axis: ScaleAxis
) -> Float16[np.ndarray, ' S']:
  """The inverse of `spread_scales`; 0 where all blocks of a scale are 0.

  Raises:
    ValueError: blocks of one scale differ.
  """
  N, B = blocks_NB.shape
  if axis == 'out':
    parts = blocks_NB.reshape(S, N // S * B)
  else:
    parts = blocks_NB.reshape(N, S, B // S).swapaxes(0, 1).reshape(S, -1)
  scale_S = parts.max(axis=1)
  wrong = (parts != scale_S[:, None]) & (parts != 0)
  if wrong.any():
    s, place = np.argwhere(wrong)[0]
    raise ValueError(
      f'scale {s} of {S} along {axis!r} is {scale_S[s]}, but one of its blocks '
      f'has {parts[s, place]}'
    )
  return scale_S


def pack(
  type: BlockType,
  codes_NK: Int8[np.ndarray, 'N K'],
  scale_NB: Float16[np.ndarray, 'N B'],
) -> UInt8[np.ndarray, 'N bytes']:
  """Blocks of some rows of a matrix, as bytes.

  Raises:
    ValueError: K is no whole number of blocks, or a code is not -1, 0 or 1.
  """
  N, K = codes_NK.shape
  size = row_bytes(type, K)
  layout = LAYOUTS[type]
  if codes_NK.size and not -1 <= codes_NK.min() <= codes_NK.max() <= 1:
    raise ValueError(
      f'codes from {codes_NK.min()} to {codes_NK.max()}: {type} takes -1, 0, 1'
    )
  t = (codes_NK + np.int8(1)).view(np.uint8).reshape(-1, layout.weights)
  blocks = np.empty((len(t), layout.bytes), np.uint8)
  qs = blocks[:, 2:] if type == 'q2_0' else blocks[:, :-2]
  if type == 'tq1_0':
    for start, stop, at, width in _STRIDES:
      planes = t[:, start:stop].reshape(len(t), -1, width)
      value = np.zeros((len(t), width), np.uint16)
      for n in range(planes.shape[1]):
        value += planes[:, n] * np.uint16(_POWERS[n])
      qs[:, at : at + width] = (value * 256 + 242) // 243
  else:
    if type == 'q2_0':
      groups = t.reshape(len(t), 16, 4)
    else:
      groups = t.reshape(len(t), 2, 4, 32).swapaxes(2, 3)
    byte = groups[..., 0].copy()
    for n in (1, 2, 3):
      byte |= groups[..., n] << np.uint8(2 * n)
    qs[:] = byte.reshape(len(t), -1)
  scale = np.where((t != 1).any(axis=1), scale_NB.reshape(-1), np.float16(0))
  at = 0 if type == 'q2_0' else layout.bytes - 2
  blocks[:, at : at + 2] = scale.astype('<f2')[:, None].view(np.uint8)
  return blocks.reshape(N, size)


def unpack(
  type: BlockType, data: UInt8[np.ndarray, 'N bytes']
) -> tuple[Int8[np.ndarray, 'N K'], Float16[np.ndarray, 'N B']]:
  """Codes and the blocks' scales of some rows of a matrix.

  Raises:
    ValueError: a byte that no ternary weights have, or rows of no whole blocks.
  """
  layout = LAYOUTS[type]
  N, size = data.shape
  if size % layout.bytes:
    raise ValueError(
      f'rows of {size} bytes are no whole blocks of {layout.bytes}'
    )
  blocks = data.reshape(-1, layout.bytes)
  qs = blocks[:, 2:] if type == 'q2_0' else blocks[:, :-2]
  at = 0 if type == 'q2_0' else layout.bytes - 2
  scale = np.ascontiguousarray(blocks[:, at : at + 2]).view('<f2')
  codes = np.empty((len(blocks), layout.weights), np.int8)
  if type == 'tq1_0':
    _check(qs[:, :48], _FIVES[qs[:, :48]], type)
    _check(qs[:, 48:], _FOURS[qs[:, 48:]], type)
    for start, stop, first, width in _STRIDES:
      for n in range((stop - start) // width):
        part = codes[:, start + n * width : start + (n + 1) * width]
        part[:] = _DIGITS[qs[:, first : first + width], n]
  else:
    _check(qs, (qs & (qs >> 1) & 0x55) == 0, type)
    shape = (len(codes), 16, 4) if type == 'q2_0' else (len(codes), 2, 32, 4)
    groups = np.empty(shape, np.int8)
    for n in range(4):
      groups[..., n] = (qs >> np.uint8(2 * n) & 3).reshape(shape[:-1])
    if type == 'tq2_0':
      groups = groups.swapaxes(2, 3)
    codes[:] = groups.reshape(len(codes), -1) - np.int8(1)
  return codes.reshape(N, -1), scale.reshape(N, -1).astype(np.float16)


def _check(qs: np.ndarray, known: np.ndarray, type: BlockType):
  if not known.all():
    block, byte = np.argwhere(~known)[0]
    raise ValueError(
      f'block {block} of {type} has the byte {qs[block, byte]:#04x}, which no '
      'weights in -1, 0, 1 have'
    )
