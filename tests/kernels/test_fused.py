# SPDX-License-Identifier: Apache-2.0
"""The fused operations against NumPy in float64, one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import oracle
from tests.model.test_decoder import VARIANTS, parameters
from tritera_jax.checkpoint import pack
from tritera_kernels import byte_matrix, fused, packed
from tritera_kernels.fused import blockwise
from tritera_kernels.matmul import ACTIVATIONS

EPSILON = 1e-5
RNG = functools.partial(np.random.default_rng, 7)


def normal(rng, *shape):
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def ternary(rng, N, K, blocks=1, axis='out', format='two_bit'):
  """A packed matrix, and the same in float64."""
  codes = rng.integers(-1, 2, (N, K)).astype(np.int8)
  scale = rng.uniform(0.5, 1.5, blocks).astype(np.float32)
  matrix = packed.pack(
    jnp.asarray(codes), jnp.asarray(scale), format=format, scale_axis=axis
  )
  repeated = np.repeat(scale.astype(np.float64), (N, K)[axis == 'in'] // blocks)
  return matrix, codes * (
    repeated[:, None] if axis == 'out' else repeated[None]
  )


def check_matmul(y, x, w, activations):
  """x is what is multiplied, in float64; y what came of it, less residuals."""
  if activations == 'int8':  # half a step of each input
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    bound = 0.51 * step * np.abs(w).sum(axis=1)
  elif activations == 'bfloat16':
    bound = 2.0**-8 * (np.abs(x) @ np.abs(w).T)
  else:
    bound = 1e-5 * (np.abs(x) @ np.abs(w).T)
  error = np.abs(y - x @ w.T)
  assert (error <= bound + 1e-6).all(), error.max()
  assert activations == 'float' or error.max() > 1e-4  # it did round


@pytest.mark.parametrize('implementation', [None, 'reference', 'composed'])
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('format', ['two_bit', 'base_three'])
def test_norm_matmul(format, activations, implementation):
  rng = RNG()
  x, gain = normal(rng, 5, 40), normal(rng, 40)
  matrices, wide = zip(
    *(ternary(rng, N, 40, blocks, format=format)
      for N, blocks in ((16, 2), (9, 1), (6, 3))),
    strict=True,
  )  # fmt: skip
  y = jax.jit(
    functools.partial(
      fused.norm_matmul,
      epsilon=EPSILON,
      activations=activations,
      implementation=implementation,
    )
  )(x, gain, matrices)
  assert y.shape == (5, 31)
  normed = oracle.rms_norm(oracle.wide(x), oracle.wide(gain), EPSILON)
  check_matmul(np.asarray(y), normed, np.concatenate(wide), activations)


def test_norm_matmul_of_bytes():
  rng = RNG()
  x, gain, w = normal(rng, 5, 40), normal(rng, 40), normal(rng, 17, 40)
  matrix = byte_matrix.quantize_rows(w)
  y = fused.norm_matmul(x, gain, matrix, epsilon=EPSILON, activations='int8')
  normed = oracle.rms_norm(oracle.wide(x), oracle.wide(gain), EPSILON)
  w = oracle.wide(byte_matrix.dequantize(matrix))
  check_matmul(np.asarray(y), normed, w, 'int8')
  with pytest.raises(ValueError, match="'float' beside a ByteMatrix"):
    fused.norm_matmul(x, gain, matrix, epsilon=EPSILON, activations='float')


@pytest.mark.parametrize('implementation', [None, 'reference', 'composed'])
@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('blocks', [1, 3])
def test_matmuls_that_add(blocks, activations, normed, implementation):
  rng = RNG()
  gate_up, residual = normal(rng, 5, 84), normal(rng, 5, 8)
  matrix, w = ternary(rng, 8, 42, blocks, 'in')
  gain = normal(rng, 42) if normed else None
  statics = {
    'epsilon': EPSILON,
    'activations': activations,
    'implementation': implementation,
  }

  def check(y, x):
    if normed:
      x = oracle.rms_norm(x, oracle.wide(gain), EPSILON)
    check_matmul(np.asarray(y) - np.asarray(residual), x, w, activations)

  x = oracle.wide(gate_up)[:, :42]
  narrow = jnp.asarray(x, jnp.float32)
  check(fused.matmul_add(narrow, gain, matrix, residual, **statics), x)
  for gate, of_gate in (
    ('silu', x / (1 + np.exp(-x))),
    ('relu2', np.where(x > 0, x, 0) ** 2),
  ):
    y = fused.gated_matmul_add(
      gate_up, gain, matrix, residual, gate=gate, **statics
    )
    check(y, of_gate * oracle.wide(gate_up)[:, 42:])


H, G, WIDTH, THETA = 6, 2, 8, 500.0
SHAPE = {'heads': H, 'kv_heads': G, 'head_dim': WIDTH,
         'theta': THETA, 'epsilon': EPSILON}  # fmt: skip


def attention_oracle(qkv, gains, heads, kv_heads):
  """Of one sequence [T, X] from position 0 on."""
  T = len(qkv)
  all_heads = qkv.reshape(T, heads + 2 * kv_heads, WIDTH)
  q, k = all_heads[:, :heads], all_heads[:, heads : heads + kv_heads]
  v = all_heads[:, heads + kv_heads :]
  if gains is not None:
    q = oracle.rms_norm(q, oracle.wide(gains[0]), EPSILON)
    k = oracle.rms_norm(k, oracle.wide(gains[1]), EPSILON)
  out = np.zeros((T, heads, WIDTH))
  for head in range(heads):
    kv = head // (heads // kv_heads)
    q_Th = oracle.rope(q[:, head], THETA)
    k_Th = oracle.rope(k[:, kv], THETA)
    for t in range(T):
      score = k_Th[: t + 1] @ q_Th[t] / np.sqrt(WIDTH)
      weight = np.exp(score - score.max())
      out[t, head] = weight / weight.sum() @ v[: t + 1, kv]
  return out.reshape(T, -1)


def attend_in_pieces(qkv_BTX, gains, cache, pieces, kv_heads=G, name=None):
  """Results [B, T, A] of tokens that come some at a time."""
  step = jax.jit(
    functools.partial(
      fused.attention, **{**SHAPE, 'kv_heads': kv_heads}, implementation=name
    ),
    donate_argnums=2,
  )
  B = len(qkv_BTX)
  results, start = [], 0
  for T in pieces:
    piece = qkv_BTX[:, start : start + T].reshape(B * T, -1)
    y, cache = step(piece, gains, cache, jnp.full(B, start, jnp.int32))
    results.append(np.asarray(y).reshape(B, T, -1))
    start += T
  return np.concatenate(results, 1), cache


def nan_cache(rows, kv_heads, slots, dtype):
  """int8 holds no NaN: its scales do."""
  return jax.tree.map(
    lambda a: jnp.full_like(a, 77 if a.dtype == jnp.int8 else jnp.nan),
    fused.empty_cache(rows, kv_heads, WIDTH, slots, dtype),
  )


def test_attention_by_blocks_of_slots(monkeypatch):
  # Three blocks of 64, where one would do.
  monkeypatch.setattr(blockwise, '_SCORES', 64)
  rng = RNG()
  qkv = normal(rng, 2, 100, (H + 2 * G) * WIDTH)
  want = np.stack(
    [attention_oracle(oracle.wide(row), None, H, G) for row in qkv]
  )
  cache = nan_cache(2, G, 192, 'float32')
  got, _ = attend_in_pieces(qkv, None, cache, [70, 30], name='blockwise')
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('normed', [False, True])
@pytest.mark.parametrize('kv_heads', [G, H, 1])
def test_attention(kv_heads, normed, dtype):
  rng = RNG()
  B, T = 2, 13
  qkv = normal(rng, B, T, (H + 2 * kv_heads) * WIDTH)
  gains = (normal(rng, WIDTH), normal(rng, WIDTH)) if normed else None
  want = np.stack(
    [attention_oracle(oracle.wide(row), gains, H, kv_heads) for row in qkv]
  )
  cache = nan_cache(B, kv_heads, 64, dtype)
  got, _ = attend_in_pieces(qkv, gains, cache, [T], kv_heads)
  error = np.abs(got - want).max() / np.abs(want).max()
  # Values and scores are rounded by 2^-9, or by half of absmax / 127.
  assert error < {'float32': 1e-5, 'bfloat16': 0.01, 'int8': 0.03}[dtype]
  assert dtype == 'float32' or error > 1e-4
  # Slots past the newest hold NaN all along.
  for pieces in ([5, 1, 1, 6], [1] * T):
    cache = nan_cache(B, kv_heads, 64, dtype)
    again, _ = attend_in_pieces(qkv, gains, cache, pieces, kv_heads)
    np.testing.assert_allclose(again, got, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_rows_stand_at_positions_of_their_own(dtype):
  rng = RNG()
  qkv = normal(rng, 2, 9, (H + 2 * G) * WIDTH)
  whole, full = attend_in_pieces(
    qkv, None, fused.empty_cache(2, G, WIDTH, 64, dtype), [9]
  )
  # Row 0 has read 7 tokens and row 1 four; both now read the two that follow.
  _, cache = attend_in_pieces(qkv, None, nan_cache(2, G, 100, dtype), [7])
  assert cache.slots == 128
  start = jnp.array([7, 4], jnp.int32)
  new = jnp.stack([qkv[0, 7:9], qkv[1, 4:6]]).reshape(4, -1)
  y, cache = fused.attention(new, None, cache, start, **SHAPE)
  want = np.stack([whole[0, 7:9], whole[1, 4:6]]).reshape(4, -1)
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=2e-6)
  np.testing.assert_array_equal(cache.v[0, :, :9], full.v[0, :, :9])
  np.testing.assert_array_equal(cache.k[1, ..., :6], full.k[1, ..., :6])


def test_int8_caches_hold_keys_and_values_to_half_a_step():
  qkv = normal(RNG(), 1, 5, (H + 2 * G) * WIDTH)
  caches = {}
  for dtype in ('float32', 'int8'):
    empty = fused.empty_cache(1, G, WIDTH, 64, dtype)
    _, caches[dtype] = attend_in_pieces(qkv, None, empty, [5])
  exact, rounded = caches['float32'], caches['int8']
  for name, axis in (('k', 2), ('v', 3)):
    x = np.asarray(getattr(exact, name))
    scale = np.asarray(getattr(rounded, f'{name}_scale'))
    step = np.abs(x).max(axis=axis) / 127
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    back = np.asarray(getattr(rounded, name)) * np.expand_dims(scale, axis)
    assert (np.abs(back - x) <= 0.501 * np.expand_dims(step, axis)).all()


def layers_of(model):
  """Every layer's weights as the fused operations take them."""
  for i in range(model.config.layers):
    get = lambda name, i=i: (model.matrices | model.rest)[f'layers.{i}.{name}']
    matrices = {
      'qkv': tuple(get(f'attention.{name}') for name in 'qkv'),
      'o': get('attention.o'),
      'gate_up': (get('mlp.gate'), get('mlp.up')),
      'down': get('mlp.down'),
    }
    norms = {name: get(name) for name in ('attention_norm', 'mlp_norm')}
    gains = {}
    if model.config.qk_norm:
      gains = {f'{n}_gain': get(f'attention.{n}_norm') for n in 'qk'}
    if model.config.sub_norm:
      gains['o_gain'] = get('attention.sub_norm')
      gains['down_gain'] = get('mlp.sub_norm')
    yield fused.LayerWeights(**matrices, **norms, **gains)


@pytest.mark.parametrize(
  ('name', 'format', 'implementation'),
  [
    ('ternary', 'two_bit', None),
    ('grouped', 'base_three', None),
    ('qk_norm', 'two_bit', 'composed'),
    ('grouped', 'two_bit', 'reference'),
    ('sub_norm', 'base_three', None),
    ('sub_norm', 'two_bit', 'reference'),
  ],
)
def test_decoder_layers_are_those_of_the_numpy_decoder(
  name, format, implementation
):
  config = VARIANTS[name]
  params = parameters(config)
  layers = list(layers_of(pack.pack_model(config, params, format=format)))
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 11))
  caches = [
    fused.empty_cache(2, config.kv_heads, config.head_dim, 11, 'float32')
    for _ in layers
  ]
  step = jax.jit(
    functools.partial(
      fused.decoder_layers,
      heads=config.heads,
      kv_heads=config.kv_heads,
      head_dim=config.head_dim,
      theta=config.rope_theta,
      epsilon=config.norm_eps,
      gate=config.mlp_activation,
      activations='float',
      implementation=implementation,
    ),
    donate_argnums=2,
  )
  embedded = params['embed']['embedding'][tokens]
  hidden = []
  for start, stop in ((0, 4), (4, 5), (5, 11)):
    x = embedded[:, start:stop].reshape(2 * (stop - start), -1)
    x, caches = step(x, layers, caches, jnp.full(2, start, jnp.int32))
    hidden.append(x.reshape(2, stop - start, -1))
  gain = oracle.wide(params['norm']['scale'])
  head = oracle.wide(params['head']['kernel'])
  for row in range(2):
    x = oracle.wide(jnp.concatenate(hidden, 1)[row])
    got = oracle.rms_norm(x, gain, config.norm_eps) @ head
    want = oracle.decoder(config, params, tokens[row])
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_a_loop_in_jit_carries_the_caches():
  config = VARIANTS['grouped']
  params = parameters(config)
  layers = list(layers_of(pack.pack_model(config, params, format='two_bit')))
  caches = [
    fused.empty_cache(1, config.kv_heads, config.head_dim, 64) for _ in layers
  ]

  @functools.partial(jax.jit, donate_argnums=2)
  def run(layers, x, caches, steps):
    def body(carry):
      n, x, caches = carry
      x, caches = fused.decoder_layers(
        x, layers, caches, n[None],
        heads=config.heads, kv_heads=config.kv_heads,
        head_dim=config.head_dim, theta=config.rope_theta,
        epsilon=config.norm_eps, gate='silu', activations='int8',
      )  # fmt: skip
      return n + 1, x, caches

    return jax.lax.while_loop(
      lambda carry: carry[0] < steps, body, (jnp.int32(0), x, caches)
    )

  x = normal(RNG(), 1, config.d_model)
  _, y, updated = run(layers, x, caches, 5)
  assert np.isfinite(y).all()
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(caches))
  assert (updated[1].v[0, 0, :5] != 0).any() and not updated[1].v[
    0, 0, 5:
  ].any()


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_it_lowers_for_machines_that_are_not_here(platform):
  qkv = jnp.ones((2, (H + 2 * G) * WIDTH))
  cache = fused.empty_cache(2, G, WIDTH, 64, 'int8')
  traced = jax.jit(functools.partial(fused.attention, **SHAPE)).trace(
    qkv, None, cache, jnp.zeros(2, jnp.int32)
  )
  assert traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'heads': 5}, 'are not heads=5'),
    ({'start_B': jnp.zeros(3, jnp.int32)}, '2 tokens are not 3 rows'),
    ({'cache': fused.empty_cache(2, 1, WIDTH, 64)}, r'cache.k has shape'),
    (
      {'cache': fused.KVCache(jnp.ones((2, G, 8, 9)), jnp.ones((2, G, 9, 8)))},
      'k has 9 slots, wanted a multiple of 64',
    ),
    ({'implementation': 'none'}, "implementation='none' is unknown"),
  ],
)
def test_attention_that_cannot_be_is_refused(change, message):
  arguments = {
    'qkv_MX': jnp.ones((2, (H + 2 * G) * WIDTH)),
    'gains': None,
    'cache': fused.empty_cache(2, G, WIDTH, 64),
    'start_B': jnp.zeros(2, jnp.int32),
    **SHAPE,
  }
  with pytest.raises(ValueError, match=message):
    fused.attention(**(arguments | change))


FLOAT = {'epsilon': EPSILON, 'activations': 'float'}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m, x: fused.matmul_add(x, None, m, x, **FLOAT), '40 wide'),
    (
      lambda m, x: fused.matmul_add(x[:, :8], None, m, x, **FLOAT),
      'residual_MN has shape',
    ),
    (
      lambda m, x: fused.gated_matmul_add(
        x[:, :16], x[0, :7], m, x[:, :12], gate='silu', **FLOAT
      ),
      r'gain_F has shape \(7,\); the matrix takes 8',
    ),
    (
      lambda m, x: fused.norm_matmul(
        x[:, :8], x[0, :8], (m,), epsilon=0.1, activations='int4'
      ),
      "activations='int4' must be",
    ),
    (
      lambda m, x: fused.gated_matmul_add(x, None, m, x, gate='silu', **FLOAT),
      'gate_up_M2F is 20 wide',
    ),
    (
      lambda m, x: fused.gated_matmul_add(x, None, m, x, gate='gelu', **FLOAT),
      "gate='gelu' must be 'silu' or 'relu2'",
    ),
  ],
)
def test_matmuls_that_cannot_be_are_refused(call, message):
  matrix, _ = ternary(RNG(), 12, 8)
  with pytest.raises(ValueError, match=message):
    call(matrix, jnp.ones((2, 40)))
