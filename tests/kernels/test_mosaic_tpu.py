# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel for TPU, in Pallas' interpreter, and lowered for a TPU.

What the TPU's own compiler says of it, `test_tpu_compile.py` asks.
"""

import dataclasses
import functools

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tritera_kernels import fused, packed, testing
from tritera_kernels.fused import LayerWeights
from tritera_kernels.matmul import api, mosaic_tpu
from tritera_kernels.mosaic import tpu, tpu_decode

FORMATS = ['two_bit', 'base_three']
# The interpreter's loops compile for long and run for milliseconds.
quick_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@pytest.fixture
def interpreted():
  with tpu.interpreted():
    yield


def problem(case: testing.Case, format='two_bit'):
  x, codes, scale = testing.problem(case)
  matrix = packed.pack(
    jnp.asarray(codes),
    jnp.asarray(scale),
    format=format,
    scale_axis=case.scale_axis,
  )
  return jnp.asarray(x), matrix, (x, codes, scale, case.scale_axis)


def check(case: testing.Case, format: str, activations: str):
  x, matrix, oracle = problem(case, format)
  y = quick_jit(functools.partial(mosaic_tpu.run, activations=activations))(
    x, matrix
  )
  testing.compare(np.asarray(y), *oracle, activations)


# Compiled for the interpreter, a case takes most of a second: two of its four
# combinations, in turns, and all four where tails and segments meet.
SUITE = [
  (name, format, activations)
  for i, name in enumerate(testing.CASES)
  for j, format in enumerate(FORMATS)
  for k, activations in enumerate(['float', 'int8'])
  if (i + j + k) % 2 == 0 or name in ('tails', 'in_3', 'outlier')
]


@pytest.mark.parametrize(('name', 'format', 'activations'), SUITE)
def test_the_suite_of_every_implementation(
  name, format, activations, interpreted
):
  check(testing.CASES[name], format, activations)


@pytest.mark.parametrize(
  ('case', 'resident'),
  [
    # Bytes by rows and by columns; blocks that hang over every edge, and
    # blocks that hold the ends of two or three segments.
    (testing.Case(70, 1020, 140), True),
    (testing.Case(5, 1020, 256), False),
    (testing.Case(35, 1020, 140, 3, 'in'), False),
    (testing.Case(5, 1020, 256, 6, 'in'), True),
  ],
  ids=lambda value: (
    f'{value.M}-{value.N}-{value.blocks}'
    if isinstance(value, testing.Case)
    else ('resident' if value else 'fetched')
  ),
)
def test_many_blocks_of_every_axis(case, resident, interpreted, monkeypatch):
  monkeypatch.setattr(tpu, '_MOST_ROWS', 96)
  monkeypatch.setattr(tpu, '_FEW_ROWS', 40)
  monkeypatch.setattr(tpu, '_MOST_OUTPUTS', 128)
  monkeypatch.setattr(tpu, '_MOST_COLUMNS', 128)
  monkeypatch.setattr(tpu, '_CHUNK_OUTPUTS', 64)
  monkeypatch.setattr(tpu, '_RESIDENT_BYTES', 2**30 if resident else 0)
  format = FORMATS[case.blocks % 2]
  for activations in ('float', 'int8'):
    check(case, format, activations)


def test_the_suite_reads_bytes_by_rows_and_by_columns():
  orders = {
    tpu._by_columns((case.N, width))
    for case in testing.CASES.values()
    for format in FORMATS
    for width in [packed.row_bytes(format, case.K, case.blocks)]
  }
  assert orders == {True, False}


@pytest.mark.parametrize('float8', [False, True])
def test_every_byte_of_a_format_becomes_its_codes(float8):
  digits = {
    'two_bit': lambda b: [b >> 2 * j & 3 for j in range(4)],
    'base_three': lambda b: [
      b * 243 // 256 // 3**j % 3 for j in (4, 3, 2, 1, 0)
    ],
  }
  for format, digits_of in digits.items():
    valid = np.frombuffer(packed.byte_tables(format)[0], np.uint8)
    # Each byte beside each other one, in all four places of a word.
    neighbours = np.stack(
      [np.roll(valid, shift) for shift in (0, 1, 7, 100)], -1
    )
    words = jnp.asarray(neighbours.copy().view(np.int32)[:, 0])
    planes = list(tpu_decode.DECODERS[format](words, float8))
    want = np.moveaxis(
      [[digits_of(int(b)) for b in row] for row in neighbours], 2, 0
    )
    for plane, want_digits in zip(planes, want, strict=True):
      got = np.asarray(plane)[:, None].view(np.uint8)
      if float8:
        got = got.view(jnp.float8_e5m2).astype(np.float32)
        want_digits = 2 * (want_digits - 1)
      np.testing.assert_array_equal(got, want_digits)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_rounded_once_at_the_end(dtype, interpreted):
  x, matrix, (_, *weights) = problem(testing.Case(3, 130, 48, 2, 'in'))
  x = x.astype(dtype)
  y = quick_jit(functools.partial(mosaic_tpu.run, activations='float'))(
    x, matrix
  )
  want, bound = testing.expected_float(np.asarray(x, np.float64), *weights)
  rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(want)
  assert y.dtype == dtype
  error = np.abs(np.asarray(y, np.float64) - want)
  assert (error <= 1.01 * (bound + rounding)).all()


@pytest.mark.parametrize('format', FORMATS)
def test_int8_is_exact_without_a_matrix_unit_for_it(
  format, interpreted, monkeypatch
):
  monkeypatch.setattr(mosaic_tpu, '_multiplies', lambda x, _: x == jnp.bfloat16)
  for name in ('tails', 'in_3', 'all_ones'):
    check(testing.CASES[name], format, 'int8')
  x, matrix, _ = problem(testing.CASES['one'])
  long = dataclasses.replace(matrix, shape=(1, 2**18))
  assert 'exceeds 131072' in mosaic_tpu.refuses(x, long, activations='int8')
  assert mosaic_tpu.refuses(x, long, activations='float') is None


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('activations', ['float', 'int8'])
def test_a_token_that_is_not_finite_spoils_no_other(
  bad, activations, interpreted
):
  x, matrix, _ = problem(testing.Case(9, 130, 48))
  run = quick_jit(functools.partial(mosaic_tpu.run, activations=activations))
  y, clean = run(x.at[4, 17].set(bad), matrix), run(x, matrix)
  assert not np.isfinite(np.asarray(y[4])).any()
  others = np.arange(9) != 4
  np.testing.assert_array_equal(y[others], clean[others])


def test_vmap_of_tokens_is_one_call_and_of_matrices_right(interpreted):
  x, matrix, _ = problem(testing.Case(4, 100, 40))
  xs = jnp.stack([x, 2 * x])
  matrices = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), matrix)
  run = functools.partial(mosaic_tpu.run, activations='int8')
  want = quick_jit(run)(xs.reshape(8, -1), matrix).reshape(2, 4, -1)
  mapped = quick_jit(jax.vmap(run, (0, None)))
  np.testing.assert_array_equal(mapped(xs, matrix), want)
  jaxpr = jax.make_jaxpr(jax.vmap(run, (0, None)))(xs, matrix)
  assert str(jaxpr).count('pallas_call[') == 1
  for axes, operands in (((None, 0), (x, matrices)), ((0, 0), (xs, matrices))):
    got = quick_jit(jax.vmap(run, axes))(*operands)
    for i in range(2):
      one = [
        jax.tree.map(lambda leaf, i=i: leaf[i], operand)
        if axis == 0
        else operand
        for axis, operand in zip(axes, operands, strict=True)
      ]
      np.testing.assert_array_equal(got[i], quick_jit(run)(*one))


@pytest.mark.parametrize('mapped', [False, True])
def test_the_gradient_of_x_passes_through_scale_times_codes(
  mapped, interpreted
):
  x, matrix, (_, codes, scale, _) = problem(testing.Case(3, 40, 12, 2, 'in'))
  dy = np.random.default_rng(1).standard_normal((3, 12)).astype(np.float32)
  run = lambda x: mosaic_tpu.run(x, matrix, activations='float')
  whole = run
  if mapped:
    whole = lambda x: jax.vmap(run)(x[:, None])[:, 0]
  got = quick_jit(lambda x, dy: jax.vjp(whole, x)[1](dy)[0])(x, dy)
  w = codes * np.repeat(scale, 20)
  np.testing.assert_allclose(got, dy @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('along', ['columns', 'rows'])
def test_under_shard_map(along, interpreted):
  """Column-parallel splits outputs, row-parallel inputs, of the float path."""
  mesh = Mesh(mesh_utils.create_device_mesh((8,)), ('tensor',))
  x, codes, scale = testing.problem(testing.Case(3, 8 * 40, 8 * 6, 8, 'in'))
  whole = packed.pack(
    jnp.asarray(codes),
    jnp.asarray(scale if along == 'rows' else scale[:1]),
    format='two_bit',
    scale_axis='in' if along == 'rows' else 'out',
  )

  def shard(x, data, scale):
    matrix = dataclasses.replace(
      whole,
      data=data,
      scale=scale,
      shape=(data.shape[0], x.shape[1]),
      scale_axis='out',
    )
    y = mosaic_tpu.run(x, matrix, activations='float')
    return jax.lax.psum(y, 'tensor') if along == 'rows' else y

  specs = {
    'columns': ((P(), P('tensor'), P()), P(None, 'tensor')),
    'rows': ((P(None, 'tensor'), P(None, 'tensor'), P('tensor')), P()),
  }
  inputs, output = specs[along]
  compiled = (
    quick_jit(
      jax.shard_map(
        shard, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False
      )
    )
    .lower(x, whole.data, whole.scale)
    .compile()
  )
  assert 'all-gather' not in compiled.as_text()
  want, bound = testing.expected_float(
    x, codes, np.asarray(whole.scale), whole.scale_axis
  )
  y = np.asarray(compiled(x, whole.data, whole.scale))
  assert (np.abs(y - want) <= bound).all()


def calls_of_the_kernel(lowered) -> int:
  return lowered.as_text().count('kernel_name = "ternary_')


def test_it_is_what_a_tpu_gets_and_nothing_else_does():
  x, matrix, _ = problem(testing.CASES['square'])
  for activations in ('float', 'int8'):
    traced = jax.jit(
      functools.partial(api.ternary_matmul, activations=activations)
    ).trace(x, matrix)
    assert calls_of_the_kernel(traced.lower(lowering_platforms=('tpu',))) == 1
    for platform in ('cpu', 'cuda'):
      lowered = traced.lower(lowering_platforms=(platform,))
      assert calls_of_the_kernel(lowered) == 0
      reason = mosaic_tpu.MOSAIC_TPU.reason(
        platform, (x, matrix), {'activations': activations}
      )
      assert reason == f'runs on tpu, not on {platform}'


def test_it_is_never_interpreted_unless_a_test_says_so():
  x, matrix, _ = problem(testing.CASES['one'])
  with pytest.raises(ValueError, match='Only interpret mode is supported'):
    mosaic_tpu.run(x, matrix, activations='int8')


def test_what_it_refuses(monkeypatch):
  x, matrix, _ = problem(testing.CASES['one'])
  reason = functools.partial(mosaic_tpu.refuses, activations='int8')
  assert reason(x, matrix) is None
  assert reason(x[:0], matrix) == 'there are no tokens'
  long = dataclasses.replace(matrix, shape=(1, 2**23))
  assert 'a segment of 8388608 inputs exceeds' in reason(x, long)
  monkeypatch.setattr(mosaic_tpu, '_multiplies', lambda *_: False)
  assert 'takes no float8_e5m2' in reason(x, matrix)


def test_exported_for_a_tpu():
  x, matrix, _ = problem(testing.CASES['square'])
  exported = jax.export.export(
    jax.jit(functools.partial(mosaic_tpu.run, activations='float')),
    platforms=('tpu',),
  )(x, matrix)
  assert exported.platforms == ('tpu',)
  assert 'kernel_name = "ternary_two_bit_float"' in exported.mlir_module()


def test_all_layers_of_a_decoder_lower_for_a_tpu():
  matrices = lambda *shapes: [
    problem(testing.Case(1, K, N))[1] for N, K in shapes
  ]
  q, k, v, o, gate, up, down = matrices(
    (32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)
  )
  layer = LayerWeights(
    jnp.ones(32), (q, k, v), o, jnp.ones(32), (gate, up), down
  )
  step = jax.jit(
    lambda x, layers, caches: fused.decoder_layers(
      x,
      layers,
      caches,
      jnp.zeros(1, jnp.int32),
      heads=2,
      kv_heads=1,
      head_dim=16,
      theta=1e4,
      epsilon=1e-5,
      gate='silu',
      activations='int8',
    )
  )
  cache = fused.empty_cache(1, 1, 16, 64, 'bfloat16')
  lowered = step.trace(jnp.ones((1, 32)), [layer], [cache]).lower(
    lowering_platforms=('tpu',)
  )
  assert calls_of_the_kernel(lowered) >= 5
