# SPDX-License-Identifier: Apache-2.0
"""The fused operations on NVIDIA GPUs.

Attention is a Triton kernel, and so is the product with a ByteMatrix. The
others are left to `composed`: beside the product that `ternary_matmul` finds,
norms, gates, roundings, residuals and sums of splits are XLA's to fuse.

Shapes as in `reference`; n runs of slots.
"""

import functools
import math

import jax
from jax.custom_batching import custom_vmap
import jax.numpy as jnp
from jaxtyping import Array, Float32

from tritera_kernels.byte_matrix import ByteMatrix
from tritera_kernels.dispatch import Implementation
from tritera_kernels.fused import reference
from tritera_kernels.fused.cache import KVCache
from tritera_kernels.gpu import shim
from tritera_kernels.matmul import triton_int8

_BLOCK = 64  # slots of a step
_WIDTHS = (32, 64, 128)
_LEAST_ROWS, _MOST_ROWS = 16, 64  # of a tile of queries
# Programs that keep a large GPU busy, and the most runs a row is cut into.
_PROGRAMS, _MOST_RUNS = 256, 16
# Two bfloat16 hold 16 bits of a query, or of a weight of softmax.
_LIMBS = 2


def norm_matmul(x_MD, gain_D, matrix, *, epsilon: float, activations: str):
  """See `api.norm_matmul`: of a ByteMatrix."""
  del activations
  x_MD = reference.rms_norm(x_MD, gain_D, epsilon)
  return triton_int8.byte_matmul_triton(x_MD, matrix)


def _norm_refuses(x_MD, gain_D, matrices, **statics) -> str | None:
  del x_MD, gain_D, statics
  if not isinstance(matrices, ByteMatrix):
    return 'has a kernel for a ByteMatrix alone'
  return triton_int8.refuses(matrices)


def some_tokens_warps(head_dim: int) -> int:
  """Warps of a tile: as many as keep it in registers."""
  return 4 if head_dim < 128 else 8


def _runs(pairs: int, slots: int) -> int:
  """How many programs share the slots of a row's key and value head."""
  return max(1, min(_PROGRAMS // pairs, slots // _BLOCK, _MOST_RUNS))


def attention(qkv_MX, gains, cache: KVCache, start_B, **statics):
  """See `api.attention`: for T = 1, one launch and a fusion of XLA.

  Under `jax.vmap` a batch of all operands but the gains stays one launch.
  """
  call = custom_vmap(functools.partial(_attention, **statics))

  @call.def_vmap
  def _(size, batched, qkv_MX, gains, cache, start_B):
    if any(jax.tree.leaves(batched[1])):
      raise NotImplementedError(
        'attention under vmap over gains: each of several models wants a call '
        'of its own; use jax.lax.map'
      )

    def fold(operand, is_batched):
      if not is_batched:
        operand = jnp.broadcast_to(operand, (size, *operand.shape))
      return operand.reshape(-1, *operand.shape[2:])

    qkv_MX, cache, start_B = jax.tree.map(
      fold, (qkv_MX, cache, start_B), (batched[0], *batched[2:])
    )
    results = jax.tree.map(
      lambda result: result.reshape(size, -1, *result.shape[1:]),
      call(qkv_MX, gains, cache, start_B),
    )
    return results, jax.tree.map(lambda _: True, results)

  return call(qkv_MX, gains, cache, start_B)


def _attention(
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
  shape = {
    'H': heads,
    'G': kv_heads,
    'h': head_dim,
    'S': cache.slots,
    'SCALE': math.log2(math.e) / head_dim**0.5,
    'BLOCK': _BLOCK,
    'INT8': cache.k_scale is not None,
    'LIMBS': 0 if cache.k.dtype == jnp.float32 else _LIMBS,
  }
  if len(qkv_MX) == len(start_B):
    return _one_token(qkv_MX, gains, cache, start_B, theta, epsilon, shape)
  q_BTHh, _, cache = reference.written(
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
  return _some_tokens(q_BTHh, cache, start_B, shape), cache


def _one_token(qkv_BX, gains, cache, start_B, theta, epsilon, shape):
  from tritera_kernels.gpu import attention as kernels

  B, G, h = len(start_B), shape['G'], shape['h']
  R = shape['H'] // G
  runs = _runs(B * G, cache.slots)
  # The same in every layer: XLA computes them once a step.
  cos_Bf, sin_Bf = reference.rotation(start_B, h, theta)
  q_gain, k_gain = gains or (cos_Bf, cos_Bf)
  first = 6  # operands before the cache
  (sums, tops), written = shim.call_triton(
    kernels.one_token,
    *(qkv_BX, cos_Bf, sin_Bf, q_gain, k_gain, start_B),
    *_leaves(cache, cos_Bf),
    in_place=range(first, first + len(jax.tree.leaves(cache))),
    out_type=(
      jax.ShapeDtypeStruct((B, G, runs, R, h), jnp.float32),
      jax.ShapeDtypeStruct((B, G, runs, 2, R), jnp.float32),
    ),
    grid=(B * G, runs),
    num_warps=4,
    num_stages=2,
    epsilon=float(epsilon),
    SPLITS=runs,
    ROWS=max(_LEAST_ROWS, 1 << (R - 1).bit_length()),
    NORMED=gains is not None,
    **shape,
  )
  return _combined(sums, tops).reshape(B, -1), KVCache(*written)


def _some_tokens(q_BTHh, cache, start_B, shape):
  from tritera_kernels.gpu import attention as kernels

  B, T, H, h = q_BTHh.shape
  y_BTHh = shim.call_triton(
    kernels.some_tokens,
    *(q_BTHh, start_B, *_leaves(cache, q_BTHh)),
    out_type=jax.ShapeDtypeStruct((B, T, H, h), jnp.float32),
    grid=(B * shape['G'], -(-T // (_MOST_ROWS // (H // shape['G'])))),
    num_warps=some_tokens_warps(h),
    num_stages=2,
    T=T,
    ROWS=_MOST_ROWS,
    **shape,
  )
  return y_BTHh.reshape(B * T, H * h)


def _leaves(cache: KVCache, unused: jax.Array) -> tuple[jax.Array, ...]:
  """Keys, values and their scales, or what is not read in their place."""
  if cache.k_scale is None:
    return cache.k, cache.v, unused, unused
  return cache.k, cache.v, cache.k_scale, cache.v_scale


def _combined(
  sums_BGnRh: Float32[Array, 'B G n R h'],
  tops_BGn2R: Float32[Array, 'B G n 2 R'],
) -> Float32[Array, 'B G R h']:
  """What the runs found, weighed in their order: one fusion, no reduction."""
  runs = range(sums_BGnRh.shape[2])
  tops = [tops_BGn2R[:, :, n, 0] for n in runs]
  top_BGR = tops[0]
  for other_BGR in tops[1:]:
    top_BGR = jnp.maximum(top_BGR, other_BGR)
  total_BGRh, weights_BGR = jnp.float32(0), jnp.float32(0)
  for n in runs:
    share_BGR = jnp.exp2(tops[n] - top_BGR)
    total_BGRh += share_BGR[..., None] * sums_BGnRh[:, :, n]
    weights_BGR += share_BGR * tops_BGn2R[:, :, n, 1]
  return total_BGRh / weights_BGR[..., None]


def _attention_refuses(
  qkv_MX, gains, cache, start_B, *, heads, kv_heads, head_dim, **statics
) -> str | None:
  del qkv_MX, gains, cache, start_B, statics
  if head_dim not in _WIDTHS:
    return f'head_dim={head_dim} is none of {_WIDTHS}'
  if heads // kv_heads > _MOST_ROWS:
    return f'{heads // kv_heads} query heads a key head exceed {_MOST_ROWS}'
  return shim.why_missing()


TRITON_GPU = {
  operation.__name__: Implementation(
    'triton_gpu', operation, platforms=('cuda',), refuses=refuses
  )
  for operation, refuses in (
    (norm_matmul, _norm_refuses),
    (attention, _attention_refuses),
  )
}
