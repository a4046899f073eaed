# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels, on every instruction set that this machine has."""

import dataclasses
import functools
import subprocess
import sys

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.kernels.test_fused import normal
from tritera_kernels import byte_matrix, fused, packed, testing
from tritera_kernels.cpu import library
from tritera_kernels.matmul import api, cpu_ffi, reference


def available() -> list[str]:
  best = library.instruction_set()
  names = []
  for name in library.INSTRUCTION_SETS:
    try:
      library.select(name)
      names.append(name)
    except ValueError:
      pass
  library.select(best)
  return names


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request):
  if request.param not in available():
    pytest.skip(f'runs on a machine with {request.param}')
  before = library.instruction_set()
  library.select(request.param)
  yield request.param
  library.select(before)


@pytest.mark.parametrize('activations', ['float', 'int8'])
@pytest.mark.parametrize('format', ['two_bit', 'base_three'])
@pytest.mark.parametrize('case', testing.CASES.values(), ids=testing.CASES)
def test_the_suite_of_every_implementation(
  case, format, activations, instruction_set
):
  del instruction_set
  testing.check(cpu_ffi.CPU_FFI, case, format, activations)


def sweep(seed: int, calls: int):
  """Shapes that meet every tail: (M, K, N, blocks, axis)."""
  rng = np.random.default_rng(seed)
  for _ in range(calls):
    blocks = int(rng.choice([1, 1, 2, 3, 6]))
    axis = str(rng.choice(['out', 'in']))
    M = int(rng.choice([1, 2, 3, 4, 7, 8, 16, 17, 33, 130]))
    K = int(rng.integers(1, 1500))
    N = int(rng.integers(1, 140))
    if axis == 'in':
      K = -(-K // blocks) * blocks
    else:
      N = -(-N // blocks) * blocks
    yield M, K, N, blocks, axis


@pytest.mark.parametrize('format', ['two_bit', 'base_three'])
def test_shapes_of_every_tail(format, instruction_set):
  calls = 60 if instruction_set != 'portable' else 10
  for i, (M, K, N, blocks, axis) in enumerate(sweep(5, calls)):
    case = testing.Case(M, K, N, blocks, axis)
    x, codes, scale = testing.problem(case, seed=i)
    matrix = packed.pack(
      jnp.asarray(codes), jnp.asarray(scale), format=format, scale_axis=axis
    )
    for activations in ('float', 'int8'):
      y = cpu_ffi.run(jnp.asarray(x), matrix, activations=activations)
      testing.compare(np.asarray(y), x, codes, scale, axis, activations)


def problem(M=3, K=130, N=48, format='two_bit'):
  x, codes, scale = testing.problem(testing.Case(M, K, N))
  return jnp.asarray(x), packed.pack(
    jnp.asarray(codes), jnp.asarray(scale), format=format, scale_axis='out'
  )


multiply = functools.partial(
  api.ternary_matmul, activations='int8', implementation='cpu_ffi'
)


def test_it_is_what_jit_chooses_here():
  x, matrix = problem()
  text = jax.jit(
    lambda x: api.ternary_matmul(x, matrix, activations='int8')
  ).lower(x)
  assert 'tritera_matmul' in text.as_text()


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize('activations', ['float', 'int8'])
def test_a_token_that_is_not_finite_spoils_no_other(
  bad, activations, instruction_set
):
  del instruction_set
  x, matrix = problem(M=9)
  spoilt = x.at[4, 17].set(bad)
  y = cpu_ffi.run(spoilt, matrix, activations=activations)
  clean = cpu_ffi.run(x, matrix, activations=activations)
  assert not np.isfinite(np.asarray(y[4])).any()
  others = np.arange(9) != 4
  np.testing.assert_array_equal(y[others], clean[others])


def test_vmap_of_tokens_of_matrices_and_of_both_is_one_call():
  x, matrix = problem(M=4)
  xs = jnp.stack([x, 2 * x, 3 * x])
  matrices = jax.tree.map(
    lambda leaf: jnp.stack([leaf, leaf[::-1], leaf]), matrix
  )
  for axes, operands in (
    ((0, None), (xs, matrix)),
    ((None, 0), (x, matrices)),
    ((0, 0), (xs, matrices)),
  ):
    mapped = jax.jit(jax.vmap(multiply, axes))
    text = mapped.lower(*operands).as_text()
    assert text.count('custom_call @tritera_matmul') == 1
    got = mapped(*operands)
    for i in range(3):
      one = (
        operand
        if axis is None
        else jax.tree.map(lambda leaf, i=i: leaf[i], operand)
        for operand, axis in zip(operands, axes, strict=True)
      )
      np.testing.assert_array_equal(got[i], multiply(*one))


def test_in_scan_and_while_loop():
  x, matrix = problem(M=2, K=48, N=48)
  want = x
  for _ in range(3):
    want = jnp.tanh(multiply(want, matrix))
  step = lambda x: jnp.tanh(multiply(x, matrix))
  scanned, _ = jax.lax.scan(lambda x, _: (step(x), None), x, length=3)
  _, looped = jax.lax.while_loop(
    lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1])), (0, x)
  )
  np.testing.assert_array_equal(scanned, want)
  np.testing.assert_array_equal(looped, want)


@pytest.mark.parametrize('along', ['columns', 'rows'])
def test_under_shard_map(along):
  """Column-parallel splits outputs, row-parallel inputs, of the float path."""
  mesh = Mesh(mesh_utils.create_device_mesh((8,)), ('tensor',))
  x, codes, scale = testing.problem(testing.Case(3, 8 * 40, 8 * 6, 8, 'in'))
  whole = packed.pack(
    jnp.asarray(codes),
    jnp.asarray(scale if along == 'rows' else scale[:1]),
    format='two_bit',
    scale_axis='in' if along == 'rows' else 'out',
  )
  run = functools.partial(
    api.ternary_matmul, activations='float', implementation='cpu_ffi'
  )

  def shard(x, data, scale):
    matrix = dataclasses.replace(
      whole,
      data=data,
      scale=scale,
      shape=(data.shape[0], x.shape[1]),
      scale_axis='out',
    )
    y = run(x, matrix)
    return jax.lax.psum(y, 'tensor') if along == 'rows' else y

  specs = {
    'columns': ((P(), P('tensor'), P()), P(None, 'tensor')),
    'rows': ((P(None, 'tensor'), P(None, 'tensor'), P('tensor')), P()),
  }
  inputs, output = specs[along]
  got = jax.jit(
    jax.shard_map(
      shard, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False
    )
  )
  operands = (jnp.asarray(x), whole.data, whole.scale)
  assert 'all-gather' not in got.lower(*operands).compile().as_text()
  np.testing.assert_allclose(
    got(*operands), run(jnp.asarray(x), whole), rtol=1e-5, atol=1e-5
  )


def test_exported_and_called_again():
  x, matrix = problem()
  exported = jax.export.export(
    jax.jit(multiply),
    platforms=('cpu',),
    disabled_checks=[
      jax.export.DisabledSafetyCheck.custom_call('tritera_matmul')
    ],
  )(x, matrix)
  np.testing.assert_array_equal(exported.call(x, matrix), multiply(x, matrix))


def test_a_donated_input_is_gone_and_the_result_right():
  x, matrix = problem(M=2, K=48, N=48)
  want = np.asarray(multiply(x, matrix))
  got = jax.jit(multiply, donate_argnums=0)(x, matrix)
  np.testing.assert_array_equal(got, want)


def test_views_that_are_not_contiguous():
  x, matrix = problem(M=4)
  wide = np.asarray(jnp.concatenate([x, x], 1))[:, ::2][:, : x.shape[1] // 2]
  narrow = packed.pack(
    packed.unpack_codes(matrix)[:, : wide.shape[1]],
    matrix.scale,
    format='two_bit',
    scale_axis='out',
  )
  np.testing.assert_array_equal(
    multiply(jnp.asarray(wide), narrow),
    multiply(jnp.asarray(np.ascontiguousarray(wide)), narrow),
  )


def test_gradient_of_the_float_path_is_the_references():
  x, matrix = problem()
  loss = lambda x, name: jnp.sum(
    jnp.sin(
      api.ternary_matmul(x, matrix, activations='float', implementation=name)
    )
  )
  np.testing.assert_allclose(
    jax.grad(loss)(x, 'cpu_ffi'),
    jax.grad(loss)(x, 'reference'),
    rtol=1e-5,
    atol=1e-6,
  )


@pytest.mark.parametrize('threads', [1, 5, 33])
def test_more_threads_than_cores_and_fewer(threads):
  """In a process of its own: XLA's pool has a thread a device at least."""
  code = (
    'from tritera_kernels import testing\n'
    'from tritera_kernels.matmul import cpu_ffi\n'
    'import jax\n'
    f'assert jax.device_count() == {threads}\n'
    "for name in ('square', 'batch', 'in_6', 'tails'):\n"
    "  for a in ('float', 'int8'):\n"
    "    testing.check(cpu_ffi.CPU_FFI, testing.CASES[name], 'two_bit', a)\n"
  )
  flags = f'--xla_force_host_platform_device_count={threads}'
  subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env={'PYTHONPATH': ':'.join(sys.path), 'XLA_FLAGS': flags,
         'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip


@pytest.mark.parametrize('name', ['sse9', 'amx' * 3])
def test_an_instruction_set_that_is_not_here_is_refused(name):
  with pytest.raises(ValueError, match=f"cannot run '{name}'"):
    library.select(name)


def test_one_that_the_environment_names_and_is_not_here_refuses_the_call():
  code = (
    'from tritera_kernels.matmul import cpu_ffi\n'
    'assert "TRITERA_CPU=\'sse9\'" in cpu_ffi.refuses()\n'
  )
  subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env={'PYTHONPATH': ':'.join(sys.path), 'TRITERA_CPU': 'sse9'},
  )


def test_without_the_library_the_reference_serves(monkeypatch, tmp_path):
  library.load.cache_clear()
  monkeypatch.setattr(library, 'PATH', tmp_path / 'libtritera.so')
  try:
    x, matrix = problem()
    plan = api.plan(x, matrix, 'int8', 'cpu')
    assert plan.chosen is reference.REFERENCE
    assert 'install a C++17 compiler' in plan.refusals['cpu_ffi']
  finally:
    library.load.cache_clear()


def test_a_library_for_a_newer_xla_is_not_registered(monkeypatch):
  library.load.cache_clear()
  monkeypatch.setattr(library, '_ffi_version', lambda: (0, 1))
  try:
    assert 'this jaxlib has 0.1' in (library.why_missing() or '')
  finally:
    library.load.cache_clear()


def test_layers_in_one_call_give_the_bits_of_the_graph(instruction_set):
  """Also that each is near the reference; M = 1, and a chunk of tokens."""
  del instruction_set
  rng = np.random.default_rng(0)
  D, F, H, G, h, L = 96, 160, 6, 2, 16, 3

  def matrix(N, K, blocks=1, axis='out'):
    codes = rng.integers(-1, 2, (N, K)).astype(np.int8)
    scale = rng.uniform(0.05, 0.1, blocks).astype(np.float32)
    return packed.pack(
      jnp.asarray(codes), jnp.asarray(scale), format=format, scale_axis=axis
    )

  # `gains` are of q, k, o and down.
  for format, activations, dtype, gate, gains, blocks, B, T in (
    ('two_bit', 'int8', 'bfloat16', 'silu', '', 1, 1, 1),
    ('base_three', 'float', 'int8', 'silu', 'qk', 2, 2, 1),
    ('two_bit', 'float', 'bfloat16', 'relu2', 'qkod', 1, 2, 7),
    ('base_three', 'int8', 'int8', 'relu2', 'o', 2, 3, 70),
    ('two_bit', 'int8', 'bfloat16', 'relu2', 'od', 1, 1, 1),
    ('base_three', 'int8', 'bfloat16', 'silu', 'd', 1, 1, 9),
  ):
    gain = lambda name, n, gains=gains: (
      normal(rng, n) if name in gains else None
    )
    layers = [
      fused.LayerWeights(
        normal(rng, D),
        tuple(matrix(n * h, D, blocks) for n in (H, G, G)),
        matrix(D, H * h, blocks, 'in'),
        normal(rng, D),
        tuple(matrix(F, D, blocks) for _ in range(2)),
        matrix(D, F, blocks, 'in'),
        gain('q', h),
        gain('k', h),
        gain('o', H * h),
        gain('d', F),
      )
      for _ in range(L)
    ]
    caches = [fused.empty_cache(B, G, h, 128, dtype) for _ in range(L)]
    statics = {
      'heads': H, 'kv_heads': G, 'head_dim': h, 'theta': 1e4,
      'epsilon': 1e-5, 'gate': gate, 'activations': activations,
    }  # fmt: skip
    x = normal(rng, B * T, D)
    start = jnp.asarray(rng.integers(0, 128 - T, B), jnp.int32)
    results = {
      name: jax.jit(
        functools.partial(fused.decoder_layers, **statics, implementation=name)
      )(x, layers, caches, start)
      for name in ('cpu_ffi', 'composed', 'reference')
    }
    for one, graph in zip(
      *map(jax.tree.leaves, (results['cpu_ffi'], results['composed'])),
      strict=True,
    ):
      np.testing.assert_array_equal(one, graph)
    near, exact = (results[name][0] for name in ('cpu_ffi', 'reference'))
    # An int8 rounding that falls the other way moves a token by a step.
    tolerance = 0.05 if activations == 'int8' or dtype == 'int8' else 0.02
    error = jnp.max(jnp.abs(near - exact)) / jnp.max(jnp.abs(exact))
    assert error < tolerance, (format, activations, dtype, gate, float(error))


def test_tokens_past_the_cache_are_refused_before_anything_is_written():
  cache = fused.empty_cache(1, 1, 8, 64)
  qkv = jnp.ones((4, 24), jnp.float32)
  for start in (61, -1, 2**30):
    with pytest.raises(Exception, match='4 tokens from position'):
      jax.block_until_ready(
        fused.attention(
          qkv, None, cache, jnp.asarray([start], jnp.int32), heads=1,
          kv_heads=1, head_dim=8, theta=1e4, epsilon=1e-5,
          implementation='cpu_ffi',
        )
      )  # fmt: skip


def test_a_head_of_bytes(instruction_set):
  """Against exact integers: digits to 255, past what maddubs can add."""
  del instruction_set
  rng = np.random.default_rng(0)
  w = rng.integers(-127, 128, (37, 333)).astype(np.int64)
  w[0] = 127
  matrix = byte_matrix.ByteMatrix(
    jnp.asarray(w + 128, jnp.uint8), jnp.ones(37, jnp.float32)
  )
  for M in (1, 2, 5, 8, 40):
    x = np.asarray(rng.integers(-127, 128, (M, 333)), np.int64)
    x[:, 0] = 127  # so that the token's scale is 1
    unit = jnp.asarray(x, jnp.float32)
    rms = np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True))
    y = fused.norm_matmul(
      unit,
      jnp.ones(333, jnp.float32),
      matrix,
      epsilon=0.0,
      activations='int8',
      implementation='cpu_ffi',
    )
    np.testing.assert_allclose(y * rms, x @ w.T, rtol=2e-5, atol=2e-2 * 333)
