# SPDX-License-Identifier: Apache-2.0
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.model.test_decoder import TINY
from tritera_jax.model import decoder, flops


def test_training_flops_are_near_those_that_xla_counts():
  # One layer: XLA counts the body of a scan once. Wide, so that norms and
  # softmax, which the formula leaves out, are small.
  config = dataclasses.replace(
    TINY, family='float', layers=1, d_model=256, d_ff=768, heads=4,
    kv_heads=4, head_dim=64, vocab_size=1024, context_length=32,
  )  # fmt: skip
  tokens = jnp.zeros((4, 32), jnp.int32)

  def total(params):
    return decoder.bind(config, params)(tokens)[0].sum()

  params = decoder.abstract_params(config)
  compiled = jax.jit(jax.grad(total)).lower(params).compile()
  counted = compiled.cost_analysis()['flops']
  assert counted == pytest.approx(
    flops.training_flops_per_token(config) * tokens.size, rel=0.1
  )


def test_parameters_by_hand():
  # 24 x 24 four times, 24 x 36 three times, two norms a layer and one more.
  per_layer = 4 * 24 * 24 + 3 * 24 * 36 + 2 * 24
  assert flops.parameters(TINY) == 2 * per_layer + 24 + 2 * 128 * 24
  assert flops.parameters(TINY, padded=False) == (
    2 * per_layer + 24 + 2 * 100 * 24
  )
  # BitNet's norms: no gains, or more of them, before o (4 x 6) and down (36).
  plain = dataclasses.replace(TINY, input_norm=True)
  assert flops.parameters(plain) == flops.parameters(TINY) - 2 * 2 * 24
  more = dataclasses.replace(TINY, sub_norm=True)
  assert flops.parameters(more) == flops.parameters(TINY) + 2 * (24 + 36)
