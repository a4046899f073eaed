# SPDX-License-Identifier: Apache-2.0
"""PackedDecoder against the Decoder whose weights it holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_decoder import VARIANTS, parameters
from tritera_jax.checkpoint import pack
from tritera_jax.generate import engine, packed
from tritera_jax.model import decoder


def pair(name, cache='float32', activations='float', **config):
  config = dataclasses.replace(VARIANTS[name], context_length=600, **config)
  params = parameters(config)
  model = pack.pack_model(config, params, format='base_three')
  return decoder.bind(config, params), packed.bind(model, activations, cache)


def tokens_of(rows, length):
  return jax.random.randint(jax.random.key(1), (rows, length), 0, 100)


def relative(got, want):
  return float(jnp.abs(got - want).max() / jnp.abs(want).max())


@pytest.mark.parametrize('name', ['ternary', 'grouped', 'qk_norm', 'sub_norm'])
def test_logits_with_and_without_a_cache(name):
  latent, model = pair(name)
  tokens = tokens_of(2, 12)
  want, _ = latent(tokens)
  forward = jax.jit(lambda model, *arguments: model(*arguments))
  got, cache = forward(model, tokens)
  assert cache is None and relative(got, want) < 2e-5
  # Positions that are given, as the Decoder takes them.
  positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
  got, _ = forward(model, tokens, positions)
  assert relative(got, want) < 2e-5
  cache, pieces = model.empty_cache(2, 14), []
  for start, stop in ((0, 5), (5, 6), (6, 12)):
    logits, cache = forward(
      model, tokens[:, start:stop], positions[:, start:stop], cache
    )
    pieces.append(logits)
  assert relative(jnp.concatenate(pieces, 1), want) < 2e-5


@pytest.mark.parametrize('name', ['qk_norm', 'sub_norm'])
def test_a_model_trained_with_int8_activations_runs_with_them(name):
  config = dataclasses.replace(VARIANTS[name], activation_bits=8)
  params = parameters(config)
  model = pack.pack_model(
    config, params, format='two_bit', activations='int8', head='float'
  )
  tokens = tokens_of(2, 12)
  want, _ = decoder.bind(config, params)(tokens)
  got, _ = packed.bind(model, cache='float32')(tokens)
  # Sums in another order move values over halves: some levels differ by one.
  assert relative(got, want) < 5e-3
  with pytest.raises(ValueError, match="give activations='int8'"):
    packed.bind(model, 'float')


@pytest.mark.parametrize('activations', ['float', 'int8'])
def test_joined_and_repacked_matrices_give_the_same_logits(activations):
  config = dataclasses.replace(VARIANTS['grouped'], scale_blocks=2)
  model = pack.pack_model(config, parameters(config), format='base_three')
  apart = packed.bind(model, activations, 'float32')
  joined = packed.bind(
    model, activations, 'float32', join=True, format='two_bit'
  )
  assert [len(apart.layers[0].qkv), len(joined.layers[0].qkv)] == [3, 1]
  tokens = tokens_of(2, 12)
  # The CPU kernels add in another order, layer by layer or all at once.
  least = 2e-5 if activations == 'float' else 0.02
  forward = jax.jit(lambda model, tokens: model(tokens)[0])
  assert relative(forward(joined, tokens), forward(apart, tokens)) < least


@pytest.mark.parametrize('name', ['ternary', 'qk_norm', 'sub_norm'])
def test_documents_are_told_apart(name):
  latent, model = pair(name, document_separator=7)
  tokens = tokens_of(2, 12).at[0, 5].set(7).at[1, 2].set(7)
  want, _ = latent(tokens)
  got, _ = model(tokens)
  assert relative(got, want) < 2e-5
  joined, _ = pair(name)[1](tokens)
  assert relative(joined, want) > 1e-3


@pytest.mark.parametrize(('cache', 'least', 'most'), [
  ('bfloat16', 1e-5, 0.03), ('int8', 1e-4, 0.1),
])  # fmt: skip
def test_a_rounded_cache_rounds(cache, least, most):
  latent, model = pair('grouped', cache)
  tokens = tokens_of(2, 40)
  assert least < relative(model(tokens)[0], latent(tokens)[0]) < most


@pytest.mark.parametrize('cache', ['bfloat16', 'int8'])
@pytest.mark.parametrize('activations', ['float', 'int8'])
def test_greedy_tokens_are_those_of_the_uncached_logits(activations, cache):
  _, model = pair('grouped', cache, activations)
  prompts = [[5, 9, 3], [7] * 40, list(range(1, 34))]
  got = engine.generate(model, prompts, new_tokens=8, stop=0)
  forward = jax.jit(lambda model, tokens: model(tokens)[0])
  for prompt, row in zip(prompts, got, strict=True):
    ids = prompt + row
    padded = jnp.asarray([ids + [0] * (64 - len(ids))], jnp.int32)
    logits = forward(model, padded)[0, len(prompt) - 1 : len(ids) - 1]
    # The one chosen is the best, up to the rounding of another order.
    chosen = logits[jnp.arange(len(row)), jnp.asarray(row)]
    best = logits[:, : model.config.vocab_size].max(-1)
    np.testing.assert_allclose(chosen, best, atol=1e-3 * float(abs(best).max()))


def test_long_prompts_share_a_compilation_and_read_as_the_decoder_reads():
  latent, model = pair('grouped')
  rng = np.random.default_rng(0)
  for lengths in ((300, 129, 4), (508, 256, 257)):
    prompts = [rng.integers(1, 100, n).tolist() for n in lengths]
    sizes = engine._prefill._cache_size()
    want = engine.generate(latent, prompts, new_tokens=4, stop=0)
    assert engine.generate(model, prompts, new_tokens=4, stop=0) == want
    sizes = engine._prefill._cache_size() - sizes
    assert sizes == (2 if lengths[0] == 300 else 0)


def test_weights_are_arguments_of_the_program():
  _, model = pair('ternary')
  text = jax.jit(lambda m, t: m(t)[0]).lower(model, tokens_of(1, 4)).as_text()
  [signature] = [line for line in text.splitlines() if '@main' in line]
  assert signature.count('%arg') == len(jax.tree.leaves(model)) + 1
