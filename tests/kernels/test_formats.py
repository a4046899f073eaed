# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tritera_kernels import formats, packed, testing

FORMATS = ['two_bit', 'base_three']


def oracle_row(codes, format):
  """A row's bytes, from the papers' formulas, byte by byte."""
  per_byte = {'two_bit': 4, 'base_three': 5}[format]
  P = math.ceil(len(codes) / per_byte)
  row = []
  for p in range(P):
    digits = [
      (int(codes[p + j * P]) if p + j * P < len(codes) else 0) + 1
      for j in range(per_byte)
    ]
    if format == 'two_bit':
      row.append(sum(d * 4**j for j, d in enumerate(digits)))
    else:
      v = sum(d * 3 ** (4 - j) for j, d in enumerate(digits))
      row.append(math.ceil(256 * v / 243))
  return row


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize(('N', 'K', 'segments'), [
  (1, 1, 1), (3, 4, 1), (2, 5, 1), (2, 7, 1), (4, 256, 1), (3, 1021, 1),
  (2, 12, 2), (3, 333, 3), (2, 66, 6),
])  # fmt: skip
def test_bytes_are_those_of_the_formulas(format, N, K, segments):
  codes = np.random.default_rng(K).integers(-1, 2, (N, K)).astype(np.int8)
  scale = jnp.linspace(0.5, 1.0, segments, dtype=jnp.float32)
  got = packed.pack(jnp.asarray(codes), scale, format=format, scale_axis='in')
  want = [
    [
      byte
      for segment in np.split(row, segments)
      for byte in oracle_row(segment, format)
    ]
    for row in codes
  ]
  np.testing.assert_array_equal(got.data, want)
  packed.check(got)
  np.testing.assert_array_equal(packed.unpack(got)[0], codes)


@pytest.mark.parametrize('format', FORMATS)
def test_bytes_written_by_hand_decode(format):
  golden, codes = testing.golden(format)
  packed.check(golden)
  np.testing.assert_array_equal(packed.unpack(golden)[0], codes)


def test_every_base_three_byte_decodes_to_its_five_trits():
  layout = formats.get('base_three')
  trits = list(itertools.product((-1, 0, 1), repeat=5))
  byte = [
    math.ceil(256 * sum((t + 1) * 3 ** (4 - j) for j, t in enumerate(five))
              / 243)
    for five in trits
  ]  # fmt: skip
  assert len(set(byte)) == 243
  decoded = layout.decode_tile(jnp.asarray(byte, jnp.uint8))
  np.testing.assert_array_equal(np.stack(decoded, -1), trits)
  valid = np.asarray(layout.is_valid(jnp.arange(256, dtype=jnp.uint8)))
  assert set(np.flatnonzero(valid)) == set(byte)


def test_a_two_bit_byte_is_valid_unless_it_holds_a_three():
  layout = formats.get('two_bit')
  valid = np.asarray(layout.is_valid(jnp.arange(256, dtype=jnp.uint8)))
  want = [all((b >> s) & 3 != 3 for s in (0, 2, 4, 6)) for b in range(256)]
  np.testing.assert_array_equal(valid, want)


@pytest.mark.parametrize(('trits', 'bits'), [
  (1, 2), (3, 5), (5, 8), (4, 6), (10, 16), (6, 9),
])  # fmt: skip
def test_the_fixed_point_fraction_is_lossless_iff_the_bits_suffice(trits, bits):
  """Theorem 1 of Spectra-1.1: 2^p > 3^k."""
  lossless = True
  for v in range(3**trits):
    rest = min(-(-(v << bits) // 3**trits), 2**bits - 1)
    digits = 0
    for _ in range(trits):
      rest *= 3
      digits = 3 * digits + (rest >> bits)
      rest &= 2**bits - 1
    lossless &= digits == v
  assert lossless == (2**bits > 3**trits)


@pytest.mark.parametrize(('format', 'bits'), [
  ('two_bit', 2.0), ('base_three', 1.6),
])  # fmt: skip
def test_bits_a_weight(format, bits):
  codes = jnp.zeros((2560, 2560), jnp.int8)
  matrix = packed.pack(codes, jnp.ones(1), format=format, scale_axis='out')
  assert matrix.bits_per_weight == pytest.approx(bits, abs=1e-5)
