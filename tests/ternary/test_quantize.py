# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from tests.ternary import oracle
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary import quantize

ORACLES = {'ternary': oracle.ternary, 'binary': oracle.binary}
SHAPES_AND_BLOCKS = [
  ((1, 1), 1, 'out'),
  ((7, 5), 1, 'out'),
  ((256, 768), 1, 'in'),
  ((256, 768), 2, 'out'),
  ((384, 96), 3, 'in'),
  ((96, 384), 6, 'out'),
  ((96, 384), 6, 'in'),
]


def latent(shape, seed=0):
  """Normal, with a few values far out, as trained latents have."""
  rng = np.random.default_rng(seed)
  w = 0.02 * rng.standard_normal(shape)
  w *= np.where(rng.random(shape) < 0.01, 30, 1)
  return jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize('family', ['ternary', 'binary'])
@pytest.mark.parametrize(('shape', 'blocks', 'axis'), SHAPES_AND_BLOCKS)
def test_codes_and_scales_are_the_papers(family, shape, blocks, axis):
  w_KN = latent(shape)
  codes, scale = quantize.quantizer(family)(w_KN, blocks, axis)
  want_codes, want_effective, want_scale = ORACLES[family](w_KN.T, blocks, axis)
  np.testing.assert_array_equal(codes, want_codes.T)
  np.testing.assert_allclose(scale, want_scale, rtol=3e-7)
  np.testing.assert_allclose(
    quantize.dequantize(codes, scale, axis), want_effective.T, rtol=3e-7
  )


@pytest.mark.parametrize('magnitude', [1e-30, 1e-4, 1.0, 1e6, 1e30])
def test_the_mean_keeps_its_precision_at_every_magnitude(magnitude):
  w_KN = latent((512, 300)) * np.float32(magnitude)
  _, scale = quantize.ternarize(w_KN)
  want = 1e-5 + np.abs(np.asarray(w_KN, np.float64)).mean()
  np.testing.assert_allclose(scale, [want], rtol=3e-7)


def test_eps_is_part_of_the_scale():
  codes, scale = quantize.ternarize(jnp.full((4, 4), 1.0))
  np.testing.assert_allclose(scale, [1.0 + 1e-5], rtol=1e-7)
  np.testing.assert_array_equal(codes, np.ones((4, 4)))


def test_an_all_zero_matrix_has_scale_eps_and_codes_zero():
  codes, scale = quantize.ternarize(jnp.zeros((8, 4)))
  assert scale.tolist() == [np.float32(1e-5)]
  assert not codes.any()
  codes, scale = quantize.binarize(jnp.zeros((8, 4)))
  assert scale.tolist() == [0.0]
  assert (codes == 1).all()


def test_ties_round_to_the_even_code_zero():
  # Powers of two make the mean exact; eps is far below half an ulp of 2^20.
  unit = np.float32(2.0**20)
  w_KN = jnp.array(
    [[unit, -unit], [unit / 2, -unit / 2], [1.5 * unit, -1.5 * unit]]
  )
  codes, scale = quantize.ternarize(w_KN)
  assert scale.tolist() == [unit]
  # |W| / gamma is 1, exactly one half, 1.5.
  assert codes.tolist() == [[1, -1], [0, 0], [1, -1]]


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('family', ['ternary', 'binary'])
def test_a_block_that_is_not_finite_has_scale_nan_and_codes_zero(bad, family):
  w_KN = latent((6, 8))
  w_KN = w_KN.at[2, 5].set(bad)
  codes, scale = quantize.quantizer(family)(w_KN, 2, 'out')
  assert np.isnan(scale).tolist() == [False, True]
  assert not codes[:, 4:].any()
  assert np.isnan(quantize.dequantize(codes, scale, 'out')[:, 4:]).all()
  fine_codes, fine_scale = quantize.quantizer(family)(w_KN[:, :4])
  np.testing.assert_array_equal(codes[:, :4], fine_codes)
  assert scale[0] == fine_scale[0]


@pytest.mark.parametrize('family', ['ternary', 'binary'])
@pytest.mark.parametrize('blocks', [1, 2])
@pytest.mark.parametrize('axis', ['out', 'in'])
def test_every_mesh_gives_the_same_bits(family, blocks, axis):
  w_KN = latent((1024, 768), seed=3)
  quantizer = jax.jit(quantize.quantizer(family), static_argnums=(1, 2))
  want_codes, want_scale = quantizer(w_KN, blocks, axis)
  for data, fsdp, tensor in ((1, 1, 1), (1, 2, 1), (1, 1, 4), (2, 2, 2)):
    count = data * fsdp * tensor
    mesh = mesh_lib.make_mesh(
      mesh_lib.MeshConfig(data, fsdp, tensor), jax.devices()[:count]
    )
    spec = PartitionSpec(('data', 'fsdp'), 'tensor')
    sharded = jax.device_put(w_KN, NamedSharding(mesh, spec))
    codes, scale = quantizer(sharded, blocks, axis)
    np.testing.assert_array_equal(codes, want_codes)
    assert np.asarray(scale).tobytes() == np.asarray(want_scale).tobytes()


def test_the_order_of_summation_does_not_matter():
  w_KN = latent((300, 500), seed=1)
  rng = np.random.default_rng(2)
  shuffled = jnp.asarray(rng.permutation(rng.permutation(w_KN, axis=0), axis=1))
  _, scale = quantize.ternarize(w_KN)
  _, again = quantize.ternarize(shuffled)
  assert scale.tolist() == again.tolist()


def test_blocks_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='scale_blocks=5 does not divide'):
    quantize.ternarize(jnp.ones((4, 8)), 5, 'out')
  with pytest.raises(ValueError, match='larger than'):
    quantize.check_blocks((8, 2**16), 1, 'out')


@pytest.mark.parametrize('shape', [(48, 96), (256, 768), (768, 256)])
def test_a_nan_anywhere_is_seen_under_jit_and_vmap(shape):
  w_LKN = jnp.stack([latent(shape), latent(shape).at[3, 70].set(jnp.nan)])
  _, scale = jax.jit(jax.vmap(quantize.ternarize))(w_LKN)
  assert np.isnan(scale).tolist() == [[False], [True]]


def test_a_floor_is_the_least_scale_and_not_added_to_it():
  """BitNet b1.58's weight_quant: codes by mean|W|, at least 1e-5."""
  w_KN = latent((96, 64))
  codes, scale = quantize.ternarize(w_KN, floor=True)
  mean = np.abs(np.asarray(w_KN, np.float64)).mean()
  np.testing.assert_allclose(scale, [mean], rtol=3e-7)
  want = np.clip(np.rint(np.asarray(w_KN, np.float64) / mean), -1, 1)
  np.testing.assert_array_equal(codes, want)
  _, scale = quantize.ternarize(jnp.full((4, 4), 1e-7), floor=True)
  np.testing.assert_array_equal(scale, np.float32([1e-5]))
