# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ternary import oracle
from tritera_jax.ternary import quantize
from tritera_jax.ternary.latents import latents_of

# Widths of TriLM 1.1B, 2.4B, 3.9B and BitNet 2B, an eighth of each.
SHAPES = [
  ((224, 640), 2, 'out'),
  ((960, 288), 3, 'in'),
  ((384, 1152), 6, 'out'),
  ((320, 864), 1, 'out'),
  ((7, 5), 1, 'in'),
]


def ternarized(w_KN, blocks=1, axis='out', *, floor):
  w_KN = jnp.asarray(w_KN, jnp.float32)
  return quantize.ternarize(w_KN, blocks, axis, floor=floor)


def random_codes(shape, seed=0):
  return np.random.default_rng(seed).integers(-1, 2, shape, np.int8)


def scales(blocks, dtype, seed=0):
  rng = np.random.default_rng(seed)
  drawn = jnp.asarray(np.exp(rng.uniform(-6, 1, blocks)), dtype)
  return np.asarray(drawn, np.float32)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
@pytest.mark.parametrize(('shape', 'blocks', 'axis'), SHAPES)
def test_every_released_scale_has_latents(shape, blocks, axis, dtype):
  for seed in range(4):
    codes_KN = random_codes(shape, seed)
    scale_S = scales(blocks, dtype, seed)
    w_KN = latents_of(codes_KN, scale_S, axis, floor=True)
    made, made_S = ternarized(w_KN, blocks, axis, floor=True)
    np.testing.assert_array_equal(made, codes_KN)
    np.testing.assert_array_equal(made_S, scale_S)
  # Not by the arithmetic that they were fitted to.
  for part, scale in zip(
    oracle.blocks_of(w_KN.T, blocks, axis), scale_S, strict=True
  ):
    mean = np.abs(part.astype(np.float64)).mean()
    np.testing.assert_allclose(mean, scale, rtol=3e-7)


@pytest.mark.parametrize('floor', [False, True])
@pytest.mark.parametrize(('shape', 'blocks', 'axis'), SHAPES)
def test_the_scales_of_latents_have_latents(shape, blocks, axis, floor):
  """What was trained here can come back from wherever it went."""
  for seed in range(4):
    w_KN = 0.05 * np.random.default_rng(seed).standard_normal(shape)
    codes_KN, scale_S = ternarized(w_KN, blocks, axis, floor=floor)
    found = latents_of(
      np.asarray(codes_KN), np.asarray(scale_S), axis, floor=floor
    )
    again_KN, again_S = ternarized(found, blocks, axis, floor=floor)
    np.testing.assert_array_equal(again_KN, codes_KN)
    np.testing.assert_array_equal(again_S, scale_S)


def test_a_unit_in_the_last_place_may_be_given():
  codes_KN = random_codes((320, 864))
  scale_S = np.float32([1 / 3])
  for _ in range(20):
    scale_S = np.nextafter(scale_S, np.float32(1), dtype=np.float32)
    w_KN = latents_of(codes_KN, scale_S, 'out', floor=True, ulps=1)
    _, made_S = ternarized(w_KN, floor=True)
    np.testing.assert_allclose(made_S, scale_S, rtol=2**-23)


def test_a_block_of_zeros_has_scale_eps():
  codes_KN = random_codes((8, 6))
  codes_KN[:, :3] = 0
  w_KN = latents_of(codes_KN, np.float32([7, 0.5]), 'out', floor=True)
  _, scale_S = ternarized(w_KN, 2, 'out', floor=True)
  np.testing.assert_array_equal(scale_S, np.float32([1e-5, 0.5]))


@pytest.mark.parametrize(
  ('codes', 'scale', 'words'),
  [
    ([[2, 0]], [1.0], 'must be -1, 0 or 1'),
    ([[1, 0]], [np.nan], 'scale nan of block 0'),
    ([[1, 0]], [np.inf], 'scale inf of block 0'),
    ([[1, 0]], [-1.0], 'scale -1.0 of block 0'),
    ([[1, 0]], [1e-5], 'more than 1e-05'),
    ([[1, 0, 1]], [1.0, 1.0], 'does not divide'),
  ],
)
def test_what_has_no_latents_is_refused(codes, scale, words):
  with pytest.raises(ValueError, match=words):
    latents_of(np.array(codes, np.int8), np.float32(scale), 'out', floor=False)
