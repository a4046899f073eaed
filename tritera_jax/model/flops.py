# SPDX-License-Identifier: Apache-2.0
"""Counts of parameters, bits and floating-point operations."""

from tritera_jax.model.config import ModelConfig

# Bits a weight of a linear layer as the papers count them (Spectra, Table 4).
PAPER_BITS = {'ternary': 1.58, 'binary': 1.0, 'float': 16.0}


def linear_parameters(config: ModelConfig) -> int:
  """Weights of the linear layers of all blocks."""
  return config.layers * sum(
    spec.in_features * spec.out_features for spec in config.linears.values()
  )


def embedding_parameters(config: ModelConfig, padded: bool = True) -> int:
  """Weights of embedding and head together (they are not tied)."""
  rows = config.padded_vocab_size if padded else config.vocab_size
  return 2 * rows * config.d_model


def norm_parameters(config: ModelConfig) -> int:
  """Gains of every RMSNorm."""
  per_block = 0 if config.input_norm else 2 * config.d_model
  if config.qk_norm:
    per_block += 2 * config.head_dim
  if config.sub_norm:
    per_block += config.heads * config.head_dim + config.d_ff
  return config.layers * per_block + config.d_model


def parameters(config: ModelConfig, padded: bool = True) -> int:
  """All parameters; the papers count the vocabulary without its padding."""
  return (
    linear_parameters(config)
    + embedding_parameters(config, padded)
    + norm_parameters(config)
  )


def size_bits(
  config: ModelConfig, bits_per_weight: float | None = None
) -> float:
  """Size as the papers count it: 1.58, 1 or 16 bits a linear weight, 16 a rest.

  The vocabulary is counted without its padding. `bits_per_weight`: of a linear
  layer, other than the family's.
  """
  if bits_per_weight is None:
    bits_per_weight = PAPER_BITS[config.family]
  rest = embedding_parameters(config, padded=False) + norm_parameters(config)
  return linear_parameters(config) * bits_per_weight + rest * 16


def training_flops_per_token(
  config: ModelConfig, sequence_length: int | None = None
) -> int:
  """Multiply-adds as two, forward and backward: 6 a weight of each matmul.

  Attention adds 6 L T H h: causal, so half of the T x T products of q k^T
  and of the weighted values. The embedding look-up is free, and so is what
  remat computes again. T defaults to the context.
  """
  T = sequence_length or config.context_length
  head = config.d_model * config.padded_vocab_size
  matmul = linear_parameters(config) + head
  width = config.heads * config.head_dim
  return 6 * (matmul + config.layers * T * width)
