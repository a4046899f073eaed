# SPDX-License-Identifier: Apache-2.0
"""Packed matrices over eight devices, whoever multiplies."""

import dataclasses
import functools

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tritera_kernels import fused, packed, sharding, testing
from tritera_kernels.cpu import library
from tritera_kernels.fused import layers, reference
from tritera_kernels.gpu import shim

DEVICES = 8
IMPLEMENTATIONS = [
  'reference',
  pytest.param(
    'cpu_ffi',
    marks=pytest.mark.skipif(
      library.why_missing() is not None, reason='there are no C++ kernels'
    ),
  ),
]


def over_devices(case, along, activations, implementation, mesh=None):
  """The jitted product over the devices, its operands, and the problem."""
  x, codes, scale = testing.problem(case)
  whole = packed.pack(
    jnp.asarray(codes),
    jnp.asarray(scale),
    format='two_bit',
    scale_axis=case.scale_axis,
  )
  matrix, specs = sharding.partition(whole, 'tensor', DEVICES, along=along)
  shapes = {
    'out': ((P(), specs), P(None, 'tensor')),
    'in': ((P(None, 'tensor'), specs), P()),
  }
  inputs, outputs = shapes[along]
  run = jax.jit(
    jax.shard_map(
      functools.partial(
        sharding.ternary_matmul,
        axis='tensor',
        along=along,
        activations=activations,
        implementation=implementation,
      ),
      mesh=mesh or Mesh(mesh_utils.create_device_mesh((DEVICES,)), ('tensor',)),
      in_specs=inputs,
      out_specs=outputs,
      check_vma=False,
    )
  )
  return run, (jnp.asarray(x), matrix), (x, codes, scale)


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ('along', 'blocks', 'axis', 'activations'),
  [
    ('out', 1, 'out', 'float'),
    ('out', 6, 'out', 'int8'),
    ('out', 2, 'in', 'bfloat16'),
    ('in', 1, 'out', 'float'),
    ('in', 8, 'in', 'bfloat16'),
    ('in', 2, 'in', 'float'),
  ],
)
def test_product_is_that_of_the_whole_matrix(
  along, blocks, axis, activations, implementation
):
  case = testing.Case(3, 8 * 40, 48, blocks, axis)
  run, operands, problem = over_devices(
    case, along, activations, implementation
  )
  text = run.lower(*operands).compile().as_text()
  assert 'all-gather' not in text
  assert ('all-reduce' in text) == (along == 'in')
  testing.compare(np.asarray(run(*operands)), *problem, axis, activations)


@pytest.mark.parametrize('along', ['out', 'in'])
def test_on_cuda_each_device_launches_for_its_part(along):
  pytest.importorskip('jax_triton')
  case = testing.Case(3, 8 * 64, 8 * 32)
  with shim.lowering_for(90):
    run, operands, _ = over_devices(case, along, 'bfloat16', 'triton_gpu')
    text = run.trace(*operands).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count(f'@{shim.TARGET}') == 1
  assert 'all_gather' not in text and ('all_reduce' in text) == (along == 'in')
  part = {'out': '32x128xui8', 'in': '256x16xui8'}[along]
  [call] = [line for line in text.splitlines() if f'@{shim.TARGET}' in line]
  assert part in call


def decoder_layer(rng, H, G, h, D, F):
  """Weights of a layer, of one scale a matrix."""

  def matrix(N, K):
    codes = jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8)
    scale = jnp.asarray([1 / K**0.5], jnp.float32)
    return packed.pack(codes, scale, format='two_bit', scale_axis='out')

  return fused.LayerWeights(
    attention_norm=jnp.ones(D),
    qkv=(matrix(H * h, D), matrix(G * h, D), matrix(G * h, D)),
    o=matrix(D, H * h),
    mlp_norm=jnp.ones(D),
    gate_up=(matrix(F, D), matrix(F, D)),
    down=matrix(D, F),
  )


@pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
def test_a_decoder_layer_in_tensor_parallel(implementation):
  """Heads and the MLP are split; two sums a layer, as Megatron has it."""
  H, G, h, D, F, n = 4, 2, 8, 32, 48, 2
  rng = np.random.default_rng(5)
  layer = decoder_layer(rng, H, G, h, D, F)
  x = jnp.asarray(rng.standard_normal((3, D)), jnp.float32)
  cache = fused.empty_cache(1, G, h, 64)
  start = jnp.zeros(1, jnp.int32)
  statics = {
    'head_dim': h, 'theta': 1e4, 'epsilon': 1e-5, 'gate': 'silu',
    'activations': 'float',
  }  # fmt: skip
  want, wanted = fused.decoder_layers(
    x, [layer], [cache], start, heads=H, kv_heads=G, **statics
  )
  along = {'qkv': 'out', 'o': 'in', 'gate_up': 'out', 'down': 'in'}
  parts, specs = {}, {}
  for field in dataclasses.fields(layer):
    value = getattr(layer, field.name)
    pairs = [
      sharding.partition(m, 'tensor', n, along=along[field.name])
      if isinstance(m, packed.PackedTernary)
      else (m, P())
      for m in (value if isinstance(value, tuple) else (value,))
    ]
    both = zip(*pairs, strict=True)
    for table, entries in zip((parts, specs), both, strict=True):
      table[field.name] = entries if isinstance(value, tuple) else entries[0]
  column, row = (
    functools.partial(
      sharding.ternary_matmul,
      axis='tensor',
      along=along,
      implementation=implementation,
    )
    for along in ('out', 'in')
  )
  heads = P(None, 'tensor')
  run = jax.shard_map(
    functools.partial(
      layers.run,
      functools.partial(reference.norm_matmul, matmul=column),
      fused.attention,
      functools.partial(reference.matmul_add, matmul=row),
      functools.partial(reference.gated_matmul_add, matmul=row),
      heads=H // n,
      kv_heads=G // n,
      **statics,
    ),
    mesh=Mesh(mesh_utils.create_device_mesh((n,), jax.devices()[:n]), 'tensor'),
    in_specs=(P(), [fused.LayerWeights(**specs)], [heads], P()),
    out_specs=(P(), [heads]),
    check_vma=False,
  )
  got, gotten = jax.jit(run)(x, [fused.LayerWeights(**parts)], [cache], start)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  np.testing.assert_array_equal(gotten[0].v, wanted[0].v)


def test_what_cannot_be_split_is_refused():
  case = testing.Case(3, 320, 48)
  with pytest.raises(ValueError, match='one scale a token'):
    run, operands, _ = over_devices(case, 'in', 'int8', 'reference')
    run(*operands)
  with pytest.raises(ValueError, match='do not divide the out axis'):
    over_devices(testing.Case(3, 320, 44), 'out', 'float', 'reference')
  with pytest.raises(ValueError, match='2 scale blocks along outputs'):
    over_devices(testing.Case(3, 320, 48, 2), 'in', 'float', 'reference')
