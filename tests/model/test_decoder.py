# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import oracle
from tritera_jax.model import decoder, quantized
from tritera_jax.model.config import ModelConfig

TINY = ModelConfig(
  family='ternary',
  vocab_size=100,
  layers=2,
  d_model=24,
  d_ff=36,
  heads=4,
  kv_heads=4,
  head_dim=6,
  context_length=16,
  init_std=0.2,
)
VARIANTS = {
  'ternary': TINY,
  'float': dataclasses.replace(TINY, family='float'),
  'binary': dataclasses.replace(TINY, family='binary', scale_blocks=2),
  'grouped': dataclasses.replace(TINY, kv_heads=2, scale_blocks=3),
  'qk_norm': dataclasses.replace(TINY, qk_norm=True, scale_blocks=6),
  'wide_heads': dataclasses.replace(TINY, head_dim=10, rope_theta=500.0),
  # BitNet b1.58 of 2024, and what its 2B-4T has; their activations below.
  'input_norm': dataclasses.replace(TINY, input_norm=True),
  'sub_norm': dataclasses.replace(
    TINY, head_dim=10, kv_heads=2, sub_norm=True, mlp_activation='relu2'
  ),
}


def parameters(config, seed=0):
  """Initial parameters with gains that are not all one."""
  params = decoder.init(config, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
      if path[-1].key == 'scale'
      else leaf
    ),
    params,
  )


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_are_those_of_the_numpy_decoder(name):
  config = VARIANTS[name]
  params = parameters(config)
  tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 11))
  logits, cache = decoder.bind(config, params)(jnp.asarray(tokens, jnp.int32))
  assert cache is None
  for row in range(2):
    want = oracle.decoder(config, params, tokens[row])
    np.testing.assert_allclose(
      logits[row], want, atol=2e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize('name', ['input_norm', 'sub_norm'])
def test_rounded_activations_are_rounded_before_every_linear_layer(name):
  config = dataclasses.replace(VARIANTS[name], activation_bits=8)
  params = parameters(config)
  tokens = np.arange(11)
  logits, _ = decoder.bind(config, params)(jnp.asarray(tokens, jnp.int32)[None])
  want = oracle.decoder(config, params, tokens)
  float_logits = oracle.decoder(VARIANTS[name], params, tokens)
  size = np.abs(want).max()
  # Where float32 and float64 fall on two sides of a half, a level differs.
  assert np.abs(logits[0] - want).max() < 2e-3 * size
  assert np.abs(want - float_logits).max() > 1e-2 * size


@pytest.mark.parametrize('name', ['ternary', 'grouped', 'qk_norm'])
def test_cached_logits_are_the_uncached_ones(name):
  config = VARIANTS[name]
  model = decoder.bind(config, parameters(config))
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 100)
  forward = jax.jit(model.__call__)
  want, _ = forward(tokens)
  # Slots hold rubbish at first: nothing may look at them.
  cache = jax.tree.map(
    lambda a: jnp.full_like(a, 1e4), model.empty_cache(2, 14)
  )
  got = []
  for start, stop in ((0, 5), (5, 6), (6, 9), (9, 12)):
    positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
    logits, cache = forward(tokens[:, start:stop], positions, cache)
    got.append(logits)
  np.testing.assert_allclose(
    jnp.concatenate(got, 1), want, atol=1e-5 * float(jnp.abs(want).max())
  )


@pytest.mark.parametrize(
  'name', ['ternary', 'binary', 'grouped', 'float', 'input_norm', 'sub_norm']
)
def test_the_effective_float_model_computes_the_same(name):
  config = VARIANTS[name]
  params = parameters(config)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 100)
  want, _ = decoder.bind(config, params)(tokens)
  effective = quantized.effective_params(config, params)
  twin = dataclasses.replace(config, family='float')
  got, _ = decoder.bind(twin, effective)(tokens)
  np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_bfloat16_compute_keeps_float32_latents_and_logits():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  params = parameters(config)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('f4')}
  tokens = jnp.arange(12, dtype=jnp.int32)[None]
  logits, _ = decoder.bind(config, params)(tokens)
  assert logits.dtype == jnp.float32
  want = oracle.decoder(config, params, np.arange(12))
  # Eight bits of mantissa through two blocks.
  np.testing.assert_allclose(logits[0], want, atol=0.1 * np.abs(want).max())


def test_initial_parameters_follow_the_key_alone():
  a, b = (decoder.init(TINY, jax.random.key(3)) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  c = decoder.init(TINY, jax.random.key(4))
  assert (a['head']['kernel'] != c['head']['kernel']).any()
  q = a['layers']['attention']['q']['kernel']
  assert (q[0] != q[1]).any()  # layers differ


@pytest.mark.parametrize('name', ['ternary', 'qk_norm'])
def test_with_a_separator_each_document_is_as_if_alone(name):
  config = dataclasses.replace(VARIANTS[name], document_separator=7)
  params = parameters(config)
  texts = [[3, 4], [7, 1, 2, 3, 9], [7], [7, 50, 3, 4]]
  whole = jnp.asarray(np.concatenate(texts)[None], jnp.int32)
  logits, _ = decoder.bind(config, params)(whole)
  start = 0
  for text in texts:
    want = oracle.decoder(config, params, np.array(text))
    got = logits[0, start : start + len(text)]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    start += len(text)
  # Without one, what is before is seen.
  joined, _ = decoder.bind(VARIANTS[name], params)(whole)
  np.testing.assert_allclose(joined[0, :2], logits[0, :2], atol=1e-5)
  assert (jnp.abs(joined[0, 2:] - logits[0, 2:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize('remat', ['dots', 'block'])
def test_what_is_computed_again_changes_no_gradient(remat):
  params = parameters(TINY)
  tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 100)

  def gradient(remat):
    return jax.jit(
      jax.grad(
        lambda p: jnp.square(
          decoder.bind(TINY, p)(tokens, remat=remat)[0]
        ).sum()
      )
    )(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max())
    ),
    gradient(remat),
    gradient('none'),
  )


def test_the_attention_that_is_asked_for_is_called(monkeypatch):
  called, attend = [], jax.nn.dot_product_attention

  def recording(*args, implementation=None, **kwargs):
    called.append(implementation)
    return attend(*args, **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', recording)
  model = decoder.bind(TINY, parameters(TINY))
  tokens = jnp.zeros((1, 4), jnp.int32)
  for attention in ('xla', 'cudnn'):
    model.hidden(tokens, attention=attention)
  assert called == ['xla', 'cudnn']
