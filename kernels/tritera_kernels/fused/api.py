# SPDX-License-Identifier: Apache-2.0
"""The fused operations of a decoder layer, and who computes them.

Everything is float32. M = B T tokens stand row by row: B rows of T tokens.
`implementation` is a name in IMPLEMENTATIONS; default: the first that does
not refuse on the platform that the program is lowered for. What an operation
means, `reference` says.

To add kernels: write a module with a table from operation to Implementation,
as `reference.REFERENCE` is one, and put it into _TABLES.
"""

from collections.abc import Sequence
import functools

from jaxtyping import Array, Float32, Int32

from tritera_kernels import byte_matrix, dispatch
from tritera_kernels import packed as packed_lib
from tritera_kernels.byte_matrix import ByteMatrix
from tritera_kernels.dispatch import Implementation
from tritera_kernels.fused import blockwise, cpu_ffi, gpu, reference
from tritera_kernels.fused import cache as cache_lib
from tritera_kernels.fused import layers as layers_lib
from tritera_kernels.fused.cache import KVCache
from tritera_kernels.fused.layers import LayerWeights
from tritera_kernels.matmul.reference import check_activations
from tritera_kernels.packed import PackedTernary

OPERATIONS = (
  'norm_matmul',
  'matmul_add',
  'gated_matmul_add',
  'attention',
  'decoder_layers',
)


def norm_matmul(
  x_MD: Float32[Array, 'M D'],
  gain_D: Float32[Array, ' D'],
  matrices: tuple[PackedTernary, ...] | ByteMatrix,
  *,
  epsilon: float,
  activations: str,
  implementation: str | None = None,
) -> Float32[Array, 'M N']:
  """RMSNorm, then x W^T of each matrix, side by side along N.

  Args:
    x_MD: tokens.
    gain_D: of the norm.
    matrices: packed ones of D inputs, or a single ByteMatrix.
    epsilon: of the norm.
    activations: as of `ternary_matmul`: the normed token is rounded once for
      all matrices. A ByteMatrix takes int8 alone.
    implementation: see the module.

  Raises:
    ValueError: shapes that do not fit, unknown activations, or the named
      implementation is unknown or refuses.
  """
  D = x_MD.shape[1]
  if isinstance(matrices, ByteMatrix):
    byte_matrix.check_layout(matrices)
    if activations != 'int8':
      raise ValueError(
        f"activations={activations!r} beside a ByteMatrix, which takes 'int8'"
      )
    _check_inputs('x_MD', D, matrices)
  else:
    for matrix in matrices:
      _check_matrix('x_MD', D, matrix, activations)
  return dispatch.call(
    IMPLEMENTATIONS['norm_matmul'],
    (x_MD, gain_D, matrices),
    {'epsilon': epsilon, 'activations': activations},
    implementation,
  )


def matmul_add(
  x_MK: Float32[Array, 'M K'],
  gain_K: Float32[Array, ' K'] | None,
  matrix: PackedTernary,
  residual_MN: Float32[Array, 'M N'],
  *,
  epsilon: float,
  activations: str,
  implementation: str | None = None,
) -> Float32[Array, 'M N']:
  """residual + x W^T.

  Arguments and errors as of `norm_matmul`, but that a gain may be None: then
  x is not normed.
  """
  _check_matrix('x_MK', x_MK.shape[1], matrix, activations)
  _check_gain('gain_K', gain_K, matrix)
  _check_residual(residual_MN, matrix)
  return dispatch.call(
    IMPLEMENTATIONS['matmul_add'],
    (x_MK, gain_K, matrix, residual_MN),
    {'epsilon': epsilon, 'activations': activations},
    implementation,
  )


def gated_matmul_add(
  gate_up_M2F: Float32[Array, 'M two_F'],
  gain_F: Float32[Array, ' F'] | None,
  matrix: PackedTernary,
  residual_MN: Float32[Array, 'M N'],
  *,
  gate: str,
  epsilon: float,
  activations: str,
  implementation: str | None = None,
) -> Float32[Array, 'M N']:
  """`matmul_add` of f(gate) up, where gate is the first F columns.

  `gate` says f: 'silu' (SwiGLU) or 'relu2' (ReLU squared). Other arguments and
  errors as of `matmul_add`.
  """
  _check_gate(gate)
  _check_matrix('gate_up_M2F', gate_up_M2F.shape[1] / 2, matrix, activations)
  _check_gain('gain_F', gain_F, matrix)
  _check_residual(residual_MN, matrix)
  return dispatch.call(
    IMPLEMENTATIONS['gated_matmul_add'],
    (gate_up_M2F, gain_F, matrix, residual_MN),
    {'gate': gate, 'epsilon': epsilon, 'activations': activations},
    implementation,
  )


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
  implementation: str | None = None,
) -> tuple[Float32[Array, 'M A'], KVCache]:
  """Causal attention of T new tokens a row to all that its cache holds.

  Args:
    qkv_MX: a token's query heads, then key heads, then value heads.
    gains: of an RMSNorm of each query and each key head; None: there is none.
    cache: of B rows. Row b's tokens are written to its slots start_B[b] ..
      start_B[b] + T - 1; the caller sees to it that there are so many.
    start_B: each row's position of its first new token. Query t sees slots
      0 .. start_B[b] + t; what lies past them may be anything, NaN too.
    heads: query heads, a multiple of kv_heads.
    kv_heads: key and value heads.
    head_dim: their width.
    theta: base of RoPE, which turns queries and keys by their positions.
    epsilon: of the norms.
    implementation: see the module.

  Returns:
    Heads side by side, and the cache with the new tokens.

  Raises:
    ValueError: shapes that do not fit, or the named implementation is unknown
      or refuses.
  """
  _check_attention(qkv_MX.shape, cache, start_B, heads, kv_heads, head_dim)
  return dispatch.call(
    IMPLEMENTATIONS['attention'],
    (qkv_MX, gains, cache, start_B),
    {
      'heads': heads,
      'kv_heads': kv_heads,
      'head_dim': head_dim,
      'theta': theta,
      'epsilon': epsilon,
    },
    implementation,
  )


def decoder_layers(
  x_MD: Float32[Array, 'M D'],
  layers: Sequence[LayerWeights],
  caches: Sequence[KVCache],
  start_B: Int32[Array, ' B'],
  *,
  heads: int,
  kv_heads: int,
  head_dim: int,
  theta: float,
  epsilon: float,
  gate: str,
  activations: str,
  implementation: str | None = None,
) -> tuple[Float32[Array, 'M D'], list[KVCache]]:
  """The residual stream past all layers, and the caches: see `layers.run`.

  Arguments and errors as of the operations above. The composed one is
  `layers.run` of those, each as its own dispatch has it.
  """
  _check_gate(gate)
  for layer, cache in zip(layers, caches, strict=True):
    for matrix in (*layer.qkv, *layer.gate_up):
      _check_matrix('x_MD', x_MD.shape[1], matrix, activations)
    rows = lambda matrices: sum(matrix.shape[0] for matrix in matrices)
    _check_matrix('attention', heads * head_dim, layer.o, activations)
    _check_matrix('gate', rows(layer.gate_up) / 2, layer.down, activations)
    _check_gain('o_gain', layer.o_gain, layer.o)
    _check_gain('down_gain', layer.down_gain, layer.down)
    _check_attention(
      (x_MD.shape[0], rows(layer.qkv)),
      cache,
      start_B,
      heads,
      kv_heads,
      head_dim,
    )
  return dispatch.call(
    IMPLEMENTATIONS['decoder_layers'],
    (x_MD, list(layers), list(caches), start_B),
    {
      'heads': heads,
      'kv_heads': kv_heads,
      'head_dim': head_dim,
      'theta': theta,
      'epsilon': epsilon,
      'gate': gate,
      'activations': activations,
    },
    implementation,
  )


def _check_inputs(name: str, K, matrix):
  if matrix.shape[1] != K:
    raise ValueError(
      f'{name} is {K:g} wide; the matrix of shape {matrix.shape} takes '
      f'{matrix.shape[1]} inputs'
    )


def _check_matrix(name: str, K, matrix: PackedTernary, activations: str):
  check_activations(activations)
  packed_lib.check_layout(matrix)
  _check_inputs(name, K, matrix)


def _check_gate(gate: str):
  if gate not in reference.GATES:
    raise ValueError(
      f'gate={gate!r} must be {" or ".join(map(repr, reference.GATES))}'
    )


def _check_gain(name: str, gain, matrix: PackedTernary):
  if gain is not None and gain.shape != matrix.shape[1:]:
    raise ValueError(
      f'{name} has shape {gain.shape}; the matrix takes {matrix.shape[1]} '
      'inputs'
    )


def _check_residual(residual_MN, matrix: PackedTernary):
  if residual_MN.shape[1] != matrix.shape[0]:
    raise ValueError(
      f'residual_MN has shape {residual_MN.shape}; the matrix has '
      f'{matrix.shape[0]} outputs'
    )


def _check_attention(shape_MX, cache: KVCache, start_B, heads, kv_heads, h):
  cache_lib.check_layout(cache)
  M, X = shape_MX
  B = start_B.shape[0]
  if (heads + 2 * kv_heads) * h != X or heads % kv_heads or h % 2:
    raise ValueError(
      f'{X} columns of queries, keys and values are not heads={heads}, '
      f'kv_heads={kv_heads} (a divisor) of an even head_dim={h}'
    )
  T = M // B if B else 0
  if M != B * T or not 0 < T <= cache.slots:
    raise ValueError(
      f'{M} tokens are not {B} rows of 1 to {cache.slots} (slots) tokens'
    )
  if cache.k.shape[:3] != (B, kv_heads, h):
    raise ValueError(
      f'cache.k has shape {cache.k.shape}, wanted {[B, kv_heads, h]} and slots'
    )


_TABLES: tuple[dict[str, Implementation], ...] = (
  cpu_ffi.CPU_FFI,
  gpu.TRITON_GPU,
  blockwise.BLOCKWISE,
  {
    **reference.COMPOSED,
    'decoder_layers': Implementation(
      'composed',
      functools.partial(
        layers_lib.run, norm_matmul, attention, matmul_add, gated_matmul_add
      ),
    ),
  },
  reference.REFERENCE,
)
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {
  operation: tuple(t[operation] for t in _TABLES if operation in t)
  for operation in OPERATIONS
}
