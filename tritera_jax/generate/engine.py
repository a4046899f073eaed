# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding of a whole batch inside one jit.

Shapes: B rows, P padded prompt length, N new tokens, V padded vocabulary.
"""

from collections.abc import Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from tritera_jax.generate import sampling as sampling_lib
from tritera_jax.generate.sampling import Sampling
from tritera_jax.model.attention import KVCache
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Block, Decoder

_PROMPT_MULTIPLE = 32  # prompts are padded to it: fewer shapes to compile


def empty_cache(model: Decoder, rows: int, slots: int):
  """A KV cache for `model`: one stacked over layers, or a list of them."""
  config = model.config
  shape = (rows, slots, config.kv_heads, config.head_dim)

  def zeros(*leading):
    array = jnp.zeros((*leading, *shape), jnp.dtype(config.dtype))
    return KVCache(array, array)

  if isinstance(model.layers, Block):
    return zeros(config.layers)
  return [zeros() for _ in range(config.layers)]


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(
  graphdef, state, tokens_BP, length_B, key, new_tokens, sampling, stop
):
  model: Decoder = nnx.merge(graphdef, state)
  B, P = tokens_BP.shape
  no_token_V = jnp.arange(model.config.padded_vocab_size) >= (
    model.config.vocab_size
  )

  # A row's randomness depends on the seed, the row and the position alone.
  key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))

  def choose(logits_BV, n):
    logits_BV = jnp.where(no_token_V, -jnp.inf, logits_BV)
    now_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, n)
    return sampling_lib.sample(sampling, now_B, logits_BV)

  # Slots past a row's prompt hold padding until decoding overwrites them;
  # no query sees a slot past its own position.
  cache = empty_cache(model, B, P + new_tokens)
  positions_BP = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
  logits_BPV, cache = model(tokens_BP, positions_BP, cache)
  last_BV = jnp.take_along_axis(
    logits_BPV, (length_B - 1)[:, None, None], axis=1
  )[:, 0]

  def body(carry):
    n, token_B, done_B, out_BN, cache = carry
    done_B |= token_B == stop
    logits_B1V, cache = model(
      token_B[:, None], (length_B + n - 1)[:, None], cache
    )
    token_B = jnp.where(done_B, stop, choose(logits_B1V[:, 0], n))
    return n + 1, token_B, done_B, out_BN.at[:, n].set(token_B), cache

  first_B = choose(last_BV, 0)
  out_BN = jnp.full((B, new_tokens), stop, jnp.int32).at[:, 0].set(first_B)
  _, _, _, out_BN, _ = jax.lax.while_loop(
    lambda carry: (
      (carry[0] < new_tokens) & ~jnp.all(carry[2] | (carry[1] == stop))
    ),
    body,
    (jnp.int32(1), first_B, jnp.zeros((B,), bool), out_BN, cache),
  )
  return out_BN


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  new_tokens: int,
  stop: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
) -> list[list[int]]:
  """Continues each prompt by up to `new_tokens` tokens, or until `stop`.

  Args:
    model: latent (see `quantized.effective_params`) or packed.
    prompts: token ids, at least one a row.
    new_tokens: most tokens to add.
    stop: the end-of-text id: ends a row, and is not returned.
    sampling: how tokens are chosen; greedy by default.
    seed: the same seed, prompts and model give the same tokens.

  Raises:
    ValueError: an empty prompt, an id outside the vocabulary, or more tokens
      than the model's context holds.
  """
  _check_prompts(model.config, prompts, new_tokens)
  lengths = [len(prompt) for prompt in prompts]
  padded = -(-max(lengths) // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
  tokens_BP = np.zeros((len(prompts), padded), np.int32)
  for row, prompt in enumerate(prompts):
    tokens_BP[row, : len(prompt)] = prompt
  out_BN = _generate(
    *nnx.split(model),
    jnp.asarray(tokens_BP),
    jnp.asarray(lengths, jnp.int32),
    jax.random.key(seed),
    new_tokens,
    sampling,
    stop,
  )
  return [_until(row, stop) for row in np.asarray(out_BN).tolist()]


def _until(row: list[int], stop: int) -> list[int]:
  return row[: row.index(stop)] if stop in row else row


def _check_prompts(config: ModelConfig, prompts, new_tokens: int):
  if new_tokens < 1:
    raise ValueError(f'new_tokens={new_tokens} must be >= 1')
  if not prompts:
    raise ValueError('prompts is empty; give at least one')
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(
        f'prompt {row} is empty; start it with the end-of-text id'
      )
    bad = [i for i in prompt if not 0 <= i < config.vocab_size]
    if bad:
      raise ValueError(
        f'prompt {row} has id {bad[0]}, outside the vocabulary of '
        f'{config.vocab_size}; was it made by another tokenizer?'
      )
    if len(prompt) + new_tokens > config.context_length:
      raise ValueError(
        f'prompt {row} of {len(prompt)} tokens and new_tokens={new_tokens} '
        f'exceed context_length={config.context_length}; shorten either'
      )
