# SPDX-License-Identifier: Apache-2.0
"""The fused operations by the C++ kernels, as XLA FFI custom calls.

`decoder_layers` is one call for all layers. It runs the very functions that
the others run, in the order of `layers.run`: the bits are equal. Caches are
results that alias their arguments, so they are written in place where the
caller donates them or carries them through a loop. Under `jax.vmap` a call
follows another.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tritera_kernels.byte_matrix import ByteMatrix
from tritera_kernels.cpu import library
from tritera_kernels.dispatch import Implementation
from tritera_kernels.fused.cache import KVCache
from tritera_kernels.fused.layers import LayerWeights
from tritera_kernels.matmul import cpu_ffi
from tritera_kernels.packed import PackedTernary


def _struct(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _matrix_statics(matrix: PackedTernary | ByteMatrix, activations: str):
  packed = isinstance(matrix, PackedTernary)
  return {
    'format': np.int64(library.FORMATS[matrix.format if packed else 'byte']),
    'along_inputs': packed and matrix.segments > 1,
    'int8': activations == 'int8',
  }


def norm_matmul(x_MD, gain_D, matrices, *, epsilon: float, activations: str):
  """See `api.norm_matmul`."""
  library.load()
  if isinstance(matrices, ByteMatrix):
    matrices = (matrices,)
  N = sum(matrix.data.shape[0] for matrix in matrices)
  return jax.ffi.ffi_call(
    'tritera_norm_matmul',
    _struct(x_MD.shape[0], N),
    vmap_method='sequential',
  )(
    x_MD,
    gain_D,
    *(part for matrix in matrices for part in (matrix.data, matrix.scale)),
    epsilon=np.float32(epsilon),
    **_matrix_statics(matrices[0], activations),
  )


def _refuses(*operands, activations: str, **statics) -> str | None:
  if activations == 'bfloat16':
    return 'rounds tokens to int8, or not at all'
  return cpu_ffi.refuses(*operands, **statics)


def _norm_refuses(x_MD, gain_D, matrices, **statics) -> str | None:
  if not isinstance(matrices, ByteMatrix):
    if not 1 <= len(matrices) <= 3:
      return f'takes 1 to 3 matrices, not {len(matrices)}'
    if len({(matrix.format, matrix.segments) for matrix in matrices}) > 1:
      return 'the matrices differ in format or in scale blocks along inputs'
  return _refuses(x_MD, gain_D, matrices, **statics)


def _add(
  target: str, x, gain, matrix, residual_MN, *, epsilon, activations, **gate
):
  library.load()
  return jax.ffi.ffi_call(
    target, _struct(*residual_MN.shape), vmap_method='sequential'
  )(
    x,
    jnp.zeros(0) if gain is None else gain,
    matrix.data,
    matrix.scale,
    residual_MN,
    epsilon=np.float32(epsilon),
    **_matrix_statics(matrix, activations),
    **gate,
  )


def matmul_add(x_MK, gain_K, matrix, residual_MN, **statics):
  """See `api.matmul_add`."""
  return _add(
    'tritera_matmul_add', x_MK, gain_K, matrix, residual_MN, **statics
  )


def gated_matmul_add(
  gate_up_M2F, gain_F, matrix, residual_MN, *, gate: str, **statics
):
  """See `api.gated_matmul_add`."""
  return _add(
    'tritera_gated_matmul_add',
    gate_up_M2F,
    gain_F,
    matrix,
    residual_MN,
    gate=np.int64(library.GATES[gate]),
    **statics,
  )


def _head_statics(heads, kv_heads, head_dim, theta, epsilon, cache: KVCache):
  return {
    'heads': np.int64(heads),
    'kv_heads': np.int64(kv_heads),
    'width': np.int64(head_dim),
    'theta': np.float32(theta),
    'epsilon': np.float32(epsilon),
    'int8_cache': cache.k.dtype == jnp.int8,
  }


def attention(
  qkv_MX,
  gains,
  cache: KVCache,
  start_B,
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
):
  """See `api.attention`."""
  library.load()
  leaves, structure = jax.tree.flatten(cache)
  q_gain, k_gain = gains or (jnp.zeros(0), jnp.zeros(0))
  first = 4  # arguments before the cache
  y_MA, *leaves = jax.ffi.ffi_call(
    'tritera_attention',
    (
      _struct(qkv_MX.shape[0], heads * head_dim),
      *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
    ),
    input_output_aliases={first + i: 1 + i for i in range(len(leaves))},
    vmap_method='sequential',
  )(
    qkv_MX,
    q_gain,
    k_gain,
    start_B,
    *leaves,
    **_head_statics(heads, kv_heads, head_dim, theta, epsilon, cache),
  )
  return y_MA, jax.tree.unflatten(structure, leaves)


def _reads(cache: KVCache) -> str | None:
  if cache.k.dtype not in (jnp.bfloat16, jnp.int8):
    return f'reads caches of bfloat16 or int8, not {cache.k.dtype}'
  return library.why_missing()


def _attention_refuses(qkv_MX, gains, cache, start_B, **statics) -> str | None:
  del qkv_MX, gains, start_B, statics
  return _reads(cache)


def _layer_arguments(layer: LayerWeights):
  for part in (
    layer.attention_norm, *layer.qkv, layer.o,
    layer.mlp_norm, *layer.gate_up, layer.down,
    *(layer.gains or ()), layer.o_gain, layer.down_gain,
  ):  # fmt: skip
    if isinstance(part, PackedTernary):
      yield from (part.data, part.scale)
    elif part is not None:
      yield part


def _norms(layer: LayerWeights) -> dict[str, bool]:
  """Which of the norms that a layer may lack it has."""
  return {
    'gains': layer.gains is not None,
    'o_gain': layer.o_gain is not None,
    'down_gain': layer.down_gain is not None,
  }


def decoder_layers(
  x_MD,
  layers: Sequence[LayerWeights],
  caches: Sequence[KVCache],
  start_B,
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
  gate: str,
  activations: str,
):
  """See `api.decoder_layers`."""
  library.load()
  weights = [a for layer in layers for a in _layer_arguments(layer)]
  leaves, structure = jax.tree.flatten(list(caches))
  first = 2 + len(weights)  # arguments before the caches
  x_MD, *leaves = jax.ffi.ffi_call(
    'tritera_decoder_layers',
    (
      _struct(*x_MD.shape),
      *(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves),
    ),
    input_output_aliases={first + i: 1 + i for i in range(len(leaves))},
    vmap_method='sequential',
  )(
    x_MD,
    start_B,
    *weights,
    *leaves,
    layers=np.int64(len(layers)),
    format=np.int64(library.FORMATS[layers[0].o.format]),
    out_along_inputs=layers[0].o.segments > 1,
    int8=activations == 'int8',
    gate=np.int64(library.GATES[gate]),
    **_norms(layers[0]),
    **_head_statics(heads, kv_heads, head_dim, theta, epsilon, caches[0]),
  )
  return x_MD, jax.tree.unflatten(structure, leaves)


def _layers_refuse(x_MD, layers, caches, start_B, **statics) -> str | None:
  if not layers:
    return 'there are no layers'
  if any((len(layer.qkv), len(layer.gate_up)) != (3, 2) for layer in layers):
    return 'takes the matrices of q, k, v, gate and up one by one'
  kinds = {
    (
      layer.o.format,
      layer.o.segments > 1,
      layer.down.segments > 1,
      tuple(_norms(layer).values()),
      *(matrix.segments for matrix in (*layer.qkv, *layer.gate_up)),
      cache.k.dtype,
    )
    for layer, cache in zip(layers, caches, strict=True)
  }
  if len(kinds) > 1:
    return 'the layers differ in format, scale axes, norms or cache'
  _, o, down, _, *segments, _ = kinds.pop()
  if o != down or set(segments) != {1}:
    return 'scale blocks lie along other axes than a decoder has them'
  return _reads(caches[0]) or _refuses(x_MD, layers, **statics)


def _implementation(run, refuses) -> Implementation:
  return Implementation(
    'cpu_ffi',
    run,
    platforms=('cpu',),
    formats=('two_bit', 'base_three'),
    refuses=refuses,
  )


CPU_FFI = {
  'norm_matmul': _implementation(norm_matmul, _norm_refuses),
  'matmul_add': _implementation(matmul_add, _refuses),
  'gated_matmul_add': _implementation(gated_matmul_add, _refuses),
  'attention': _implementation(attention, _attention_refuses),
  'decoder_layers': _implementation(decoder_layers, _layers_refuse),
}
