# SPDX-License-Identifier: Apache-2.0
"""The operations of a decoder layer, each in one pass over its weights."""

from tritera_kernels.fused.api import (
  IMPLEMENTATIONS,
  attention,
  decoder_layers,
  gated_matmul_add,
  matmul_add,
  norm_matmul,
)
from tritera_kernels.fused.cache import CacheType, KVCache, empty_cache
from tritera_kernels.fused.layers import LayerWeights

__all__ = [
  'IMPLEMENTATIONS',
  'CacheType',
  'KVCache',
  'LayerWeights',
  'attention',
  'decoder_layers',
  'empty_cache',
  'gated_matmul_add',
  'matmul_add',
  'norm_matmul',
]
