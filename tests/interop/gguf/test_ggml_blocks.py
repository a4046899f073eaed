# SPDX-License-Identifier: Apache-2.0
"""Blocks against the `gguf` package's quantiser and against bytes by hand."""

import struct

import gguf
import numpy as np
import pytest

from tritera_jax.interop.gguf import ggml_blocks

KINDS = {
  'tq1_0': gguf.GGMLQuantizationType.TQ1_0,
  'tq2_0': gguf.GGMLQuantizationType.TQ2_0,
}


def q2_0_by_the_header(row: list[int], scales: list[float]) -> bytes:
  """One row, as block_q2_0 of ggml-common.h says, weight by weight."""
  out = b''
  for block, scale in enumerate(scales):
    qs = [0] * 16
    for j, code in enumerate(row[64 * block : 64 * block + 64]):
      qs[j // 4] |= (code + 1) << 2 * (j % 4)
    out += struct.pack('<e', scale) + bytes(qs)
  return out


def matrix(N: int, K: int, S: int, axis: str, seed: int = 0):
  rng = np.random.default_rng(seed)
  codes = rng.integers(-1, 2, (N, K)).astype(np.int8)
  scale = rng.uniform(0.004, 0.3, S).astype(np.float16).astype(np.float32)
  along = np.repeat(scale, (N if axis == 'out' else K) // S)
  dense = codes * (along[:, None] if axis == 'out' else along)
  return codes, scale, dense.astype(np.float32)


def packed(type, codes, scale, axis):
  half = ggml_blocks.half_scales(scale)
  assert half.change == 0
  spread = ggml_blocks.spread_scales(type, codes.shape, half.values, axis)
  return ggml_blocks.pack(type, codes, spread)


@pytest.mark.parametrize('type', KINDS)
@pytest.mark.parametrize('axis', ['out', 'in'])
def test_bytes_are_those_of_the_gguf_package(type, axis):
  codes, scale, dense = matrix(6, 1536, 3, axis)
  codes[4, 256:512] = 0  # a block of nothing but zeros
  dense[4, 256:512] = 0
  data = packed(type, codes, scale, axis)
  np.testing.assert_array_equal(data, gguf.quants.quantize(dense, KINDS[type]))
  there = gguf.quants.dequantize(data, KINDS[type])
  np.testing.assert_array_equal(there, dense)


@pytest.mark.parametrize('axis', ['out', 'in'])
def test_q2_0_is_what_ggmls_header_says(axis):
  codes, scale, _ = matrix(4, 256, 2, axis)
  data = packed('q2_0', codes, scale, axis)
  for n in range(4):
    along = [scale[n // 2]] * 4 if axis == 'out' else [*scale[[0, 0, 1, 1]]]
    assert data[n].tobytes() == q2_0_by_the_header(codes[n].tolist(), along)


def test_bytes_by_hand():
  codes = np.zeros((1, 256), np.int8)
  codes[0, 0], codes[0, 255] = 1, -1
  one = np.ones((1, 1), np.float16)
  # 1 1 1 1 1 in base 3 is 121, 2 1 1 1 1 is 202; 1 1 1 1 0 is 120, and
  # 1 1 1 0 0 is 117.
  fives = [-(-256 * v // 243) for v in (202, 121, 120, 117)]
  wanted = bytes([fives[0]] + [fives[1]] * 47 + [fives[2]] * 3 + [fives[3]])
  data = ggml_blocks.pack('tq1_0', codes, one)
  assert data.tobytes() == wanted + b'\x00\x3c'
  wanted = bytes([0x56] + [0x55] * 62 + [0x15])
  data = ggml_blocks.pack('tq2_0', codes, one)
  assert data.tobytes() == wanted + b'\x00\x3c'
  data = ggml_blocks.pack('q2_0', codes, np.ones((1, 4), np.float16))
  zeros = bytes(2) + b'\x55' * 16
  assert data[0, :18].tobytes() == b'\x00\x3c\x56' + b'\x55' * 15
  assert data[0, 18:54].tobytes() == 2 * zeros
  assert data[0, 54:].tobytes() == b'\x00\x3c' + b'\x55' * 15 + b'\x15'


@pytest.mark.parametrize('type', ggml_blocks.BLOCK_TYPES)
@pytest.mark.parametrize('axis', ['out', 'in'])
def test_codes_and_scales_come_back(type, axis):
  codes, scale, _ = matrix(6, 1536, 2, axis)
  data = packed(type, codes, scale, axis)
  found, blocks = ggml_blocks.unpack(type, data)
  np.testing.assert_array_equal(found, codes)
  gathered = ggml_blocks.gathered_scales(blocks, 2, axis)
  np.testing.assert_array_equal(gathered, scale)
  # Row by row it is the same.
  rows = [ggml_blocks.unpack(type, data[n : n + 1])[0][0] for n in range(6)]
  np.testing.assert_array_equal(rows, codes)


def test_the_scale_of_each_block_must_be_its_matrixs():
  codes, scale, _ = matrix(4, 512, 2, 'in')
  _, blocks = ggml_blocks.unpack('tq2_0', packed('tq2_0', codes, scale, 'in'))
  with pytest.raises(ValueError, match="along 'out' is .* one of its blocks"):
    ggml_blocks.gathered_scales(blocks, 2, 'out')


def test_o_of_trilm_1_1b_fits_q2_0_alone():
  """896 inputs a scale: 3.5 blocks of 256, 14 of 64."""
  codes, scale, _ = matrix(2, 1792, 2, 'in')
  for type in KINDS:
    with pytest.raises(ValueError, match='scale is of 896 of 1792 .* two'):
      packed(type, codes, scale, 'in')
  data = packed('q2_0', codes, scale, 'in')
  found, blocks = ggml_blocks.unpack('q2_0', data)
  np.testing.assert_array_equal(found, codes)
  assert blocks[0].tolist() == [scale[0]] * 14 + [scale[1]] * 14


@pytest.mark.parametrize('type, K', [('tq1_0', 896), ('q2_0', 100)])
def test_rows_that_are_no_whole_blocks_are_refused(type, K):
  with pytest.raises(ValueError, match=f'{type} has blocks of .* {K} inputs'):
    ggml_blocks.row_bytes(type, K)


def test_a_scale_that_float16_has_not_is_rounded_and_said():
  exact = ggml_blocks.half_scales(np.array([0.5, 0], np.float32))
  assert exact.change == 0
  rounded = ggml_blocks.half_scales(np.array([0.5, 0.1], np.float32))
  # 0.1 is 1.6 / 16, and 1.6 in eleven bits is 1638 / 1024.
  assert rounded.values[1] == 1638 / 2**14
  assert rounded.change == pytest.approx(1 - 16380 / 2**14, rel=1e-4)


@pytest.mark.parametrize('scale', [np.nan, np.inf, 7e4, -0.1, 1e-8])
def test_a_scale_out_of_range_is_refused(scale):
  with pytest.raises(ValueError, match='float16'):
    ggml_blocks.half_scales(np.array([1, scale], np.float32))


def test_codes_and_bytes_that_are_not_ternary_are_refused():
  codes = np.full((1, 256), 2, np.int8)
  for type in ggml_blocks.BLOCK_TYPES:
    with pytest.raises(ValueError, match='codes from 2 to 2'):
      ggml_blocks.pack(type, codes, np.ones((1, 4), np.float16))
    data = np.full((1, ggml_blocks.row_bytes(type, 256)), 0xFF, np.uint8)
    if type == 'tq1_0':
      data[:] = 1  # ceil(256 / 243) is 2: 1 is nobody's
    with pytest.raises(ValueError, match=f'block 0 of {type} has the byte'):
      ggml_blocks.unpack(type, data)
  with pytest.raises(ValueError, match='rows of 55 bytes'):
    ggml_blocks.unpack('tq1_0', np.zeros((1, 55), np.uint8))
