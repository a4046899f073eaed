# SPDX-License-Identifier: Apache-2.0
"""The meaning of the fused operations, in plain jnp. It serves every call.

Shapes: M = B T tokens, row by row; D width, K inputs, N outputs, F width of
the MLP; H query heads, G key/value heads, R = H / G, h head width, S slots.
X = (H + 2 G) h, A = H h. All float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from tritera_kernels.byte_matrix import OFFSET, ByteMatrix
from tritera_kernels.dispatch import Implementation
from tritera_kernels.fused import cache as cache_lib
from tritera_kernels.fused import layers as layers_lib
from tritera_kernels.fused.cache import KVCache
from tritera_kernels.matmul import api as matmul_api
from tritera_kernels.matmul import reference as matmul_reference
from tritera_kernels.packed import PackedTernary

# Multiplies tokens by a packed matrix: (x_MK, matrix, activations=...).
_reference_matmul = matmul_reference.run

# What becomes of the gate of an MLP before it multiplies.
GATES = {
  'silu': jax.nn.silu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),
}


def rms_norm(
  x: Float32[Array, '*batch D'], gain_D: Float32[Array, ' D'], epsilon: float
) -> Float32[Array, '*batch D']:
  """x / sqrt(mean(x^2) + epsilon) * gain."""
  mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean + epsilon) * gain_D


def _normed(x, gain, epsilon: float):
  return x if gain is None else rms_norm(x, gain, epsilon)


def byte_matmul(
  x_MK: Float32[Array, 'M K'], matrix: ByteMatrix
) -> Float32[Array, 'M N']:
  """x W^T with int8 activations: float32(exact int32 sum) * scale * token's."""
  q_MK, token_scale_M = matmul_reference.quantize_activations(x_MK)
  w_NK = (matrix.data.astype(jnp.int16) - OFFSET).astype(jnp.int8)
  sums_MN = jax.lax.dot_general(
    q_MK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
  )
  return (
    sums_MN.astype(jnp.float32) * matrix.scale[None] * token_scale_M[:, None]
  )


def norm_matmul(
  x_MD: Float32[Array, 'M D'],
  gain_D: Float32[Array, ' D'],
  matrices: tuple[PackedTernary, ...] | ByteMatrix,
  *,
  epsilon: float,
  activations: str,
  matmul=_reference_matmul,
) -> Float32[Array, 'M N']:
  """RMSNorm, then x W^T of each matrix, side by side."""
  x_MD = rms_norm(x_MD, gain_D, epsilon)
  if isinstance(matrices, ByteMatrix):
    return byte_matmul(x_MD, matrices)
  return jnp.concatenate(
    [matmul(x_MD, matrix, activations=activations) for matrix in matrices], 1
  )


def matmul_add(
  x_MK: Float32[Array, 'M K'],
  gain_K: Float32[Array, ' K'] | None,
  matrix: PackedTernary,
  residual_MN: Float32[Array, 'M N'],
  *,
  epsilon: float,
  activations: str,
  matmul=_reference_matmul,
) -> Float32[Array, 'M N']:
  """residual + x W^T, where x is normed first if there is a gain."""
  x_MK = _normed(x_MK, gain_K, epsilon)
  return residual_MN + matmul(x_MK, matrix, activations=activations)


def gated_matmul_add(
  gate_up_M2F: Float32[Array, 'M two_F'],
  gain_F: Float32[Array, ' F'] | None,
  matrix: PackedTernary,
  residual_MN: Float32[Array, 'M N'],
  *,
  gate: str,
  epsilon: float,
  activations: str,
  matmul=_reference_matmul,
) -> Float32[Array, 'M N']:
  """`matmul_add` of f(gate) up, where gate is the first F columns."""
  gate_MF, up_MF = jnp.split(gate_up_M2F, 2, axis=1)
  return matmul_add(
    GATES[gate](gate_MF) * up_MF,
    gain_F,
    matrix,
    residual_MN,
    epsilon=epsilon,
    activations=activations,
    matmul=matmul,
  )


def rotation(
  positions: Int32[Array, '*batch'], head_dim: int, theta: float
) -> tuple[Float32[Array, '*batch f'], Float32[Array, '*batch f']]:
  """Cosine and sine of RoPE's angles, of f = head_dim / 2 pairs."""
  half = head_dim // 2
  frequency_f = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[..., None].astype(jnp.float32) * frequency_f
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x_BTHh: Float32[Array, 'B T H h'],
  positions_BT: Int32[Array, 'B T'],
  theta: float,
) -> Float32[Array, 'B T H h']:
  """RoPE over the whole head, channels i and i + h/2 paired."""
  cos_BTf, sin_BTf = rotation(positions_BT, x_BTHh.shape[-1], theta)
  cos, sin = cos_BTf[:, :, None], sin_BTf[:, :, None]
  a, b = jnp.split(x_BTHh, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def split_heads(
  qkv_BTX: Float32[Array, 'B T X'],
  gains: tuple[Float32[Array, ' h'], Float32[Array, ' h']] | None,
  positions_BT: Int32[Array, 'B T'],
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
) -> tuple[
  Float32[Array, 'B T H h'],
  Float32[Array, 'B T G h'],
  Float32[Array, 'B T G h'],
]:
  """Queries and keys, normed if there are gains, then turned; and values."""
  all_heads = qkv_BTX.reshape(*qkv_BTX.shape[:2], -1, head_dim)
  q_BTHh, k_BTGh, v_BTGh = jnp.split(
    all_heads, [heads, heads + kv_heads], axis=2
  )
  if gains is not None:
    q_BTHh = rms_norm(q_BTHh, gains[0], epsilon)
    k_BTGh = rms_norm(k_BTGh, gains[1], epsilon)
  return (
    rotate(q_BTHh, positions_BT, theta),
    rotate(k_BTGh, positions_BT, theta),
    v_BTGh,
  )


def written(
  qkv_MX: Float32[Array, 'M X'],
  gains: tuple[Float32[Array, ' h'], Float32[Array, ' h']] | None,
  cache: KVCache,
  start_B: Int32[Array, ' B'],
  **shape,
) -> tuple[Float32[Array, 'B T H h'], Int32[Array, 'B T'], KVCache]:
  """Queries, positions, and the cache with the new keys and values in it.

  `shape` is what `split_heads` takes by name.
  """
  B = start_B.shape[0]
  T = len(qkv_MX) // B
  positions_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
  q_BTHh, k_BTGh, v_BTGh = split_heads(
    qkv_MX.reshape(B, T, -1), gains, positions_BT, **shape
  )
  cache = cache_lib.write(cache, k_BTGh, v_BTGh, start_B)
  return q_BTHh, positions_BT, cache


def attention(
  qkv_MX: Float32[Array, 'M X'],
  gains: tuple[Float32[Array, ' h'], Float32[Array, ' h']] | None,
  cache: KVCache,
  start_B: Int32[Array, ' B'],
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
) -> tuple[Float32[Array, 'M A'], KVCache]:
  """softmax(q k^T / sqrt(h)) v over the cache, with the new tokens in it."""
  M, (B,) = len(qkv_MX), start_B.shape
  T = M // B
  q_BTHh, positions_BT, cache = written(
    qkv_MX,
    gains,
    cache,
    start_B,
    heads=heads,
    kv_heads=kv_heads,
    head_dim=head_dim,
    theta=theta,
    epsilon=epsilon,
  )
  k_BGhS, v_BGSh = cache_lib.read(cache)
  slot_S = jnp.arange(cache.slots)
  # A weight of 0 does not hide a NaN: unseen values are taken out, too.
  seen_BS = slot_S < start_B[:, None] + T
  v_BGSh = jnp.where(seen_BS[:, None, :, None], v_BGSh, 0.0)
  einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  q_BTGRh = q_BTHh.reshape(B, T, kv_heads, heads // kv_heads, head_dim)
  score_BGRTS = einsum('BTGRh,BGhS->BGRTS', q_BTGRh, k_BGhS) / head_dim**0.5
  visible_BTS = slot_S <= positions_BT[..., None]
  weight_BGRTS = jax.nn.softmax(
    jnp.where(visible_BTS[:, None, None], score_BGRTS, -jnp.inf), axis=-1
  )
  y_BTGRh = einsum('BGRTS,BGSh->BTGRh', weight_BGRTS, v_BGSh)
  return y_BTGRh.reshape(M, heads * head_dim), cache


def decoder_layers(*operands, **statics):
  """`layers.run` of the functions above."""
  return layers_lib.run(
    norm_matmul,
    attention,
    matmul_add,
    gated_matmul_add,
    *operands,
    **statics,
  )


_OPERATIONS = (norm_matmul, matmul_add, gated_matmul_add)

REFERENCE = {
  operation.__name__: Implementation('reference', operation)
  for operation in (*_OPERATIONS, attention, decoder_layers)
}
# jnp around whatever kernel `ternary_matmul` finds; the same where it finds
# the reference.
COMPOSED = {
  operation.__name__: Implementation(
    'composed',
    functools.partial(operation, matmul=matmul_api.ternary_matmul),
  )
  for operation in _OPERATIONS
}
