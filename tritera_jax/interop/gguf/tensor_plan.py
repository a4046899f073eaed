# SPDX-License-Identifier: Apache-2.0
"""Which tensors a GGUF file gets of a model, of what types; made one by one."""

from collections.abc import Callable
import functools
from typing import Literal, NamedTuple, get_args

from jaxtyping import Float32
import numpy as np

from tritera_jax.checkpoint import pack
from tritera_jax.checkpoint.pack import Matrix
from tritera_jax.interop.gguf import ggml_blocks, layout
from tritera_jax.interop.gguf.ggml_blocks import BLOCK_TYPES, BlockType
from tritera_jax.model import quantized
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params

Types = Literal['tq1_0', 'tq2_0', 'q2_0', 'f16', 'f32']
Otherwise = Literal['q2_0', 'f16', 'f32']
FloatTypes = Literal['f16', 'f32', 'bf16', 'q8_0']


def ternary_matrices(config: ModelConfig, params: Params) -> dict[str, Matrix]:
  """Every matrix by name; none of a FloatLM."""
  if config.family == 'float':
    return {}
  return {matrix.name: matrix for matrix in pack.matrices(config, params)}


class Planned(NamedTuple):
  """A tensor to be written.

  Attributes:
    name: ggml's.
    type: its type's name.
    shape: of its weights.
    make: gives the weights, or their blocks.
    change: by what share of itself a scale changes at most.
  """

  name: str
  type: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]
  change: float = 0.0


def plan_tensors(
  config: ModelConfig,
  params: Params,
  matrices: dict[str, Matrix],
  types: Types,
  otherwise: Otherwise | None,
  embedding: FloatTypes,
  head: FloatTypes,
) -> list[Planned]:
  """Every tensor of the file; refuses those that cannot be written."""
  _check_types(config, types, embedding, head)
  rest = pack.rest(config, params)
  output = rest.pop('head').T
  # Without a head, llama.cpp multiplies by the embedding.
  if embedding != head or not np.array_equal(output, rest['embed']):
    rest['head'] = output
  kinds = {'embed': embedding, 'head': head}
  plan = [
    _floats(name, kinds.get(name, 'f32'), functools.partial(np.asarray, leaf))
    for name, leaf in rest.items()
  ]
  for name, linear, layer in layout.matrices(config):
    order = layout.row_order(config, linear)
    if config.family == 'float':
      weights = quantized.latents(config, params)[linear]
      make = functools.partial(_reordered, weights, layer, order)
      plan.append(_floats(name, types, make))
      continue
    matrix = matrices[name]
    kind = _matrix_type(name, matrix, types, otherwise)
    if kind == 'f32':
      make = functools.partial(_dense, matrix, order)
      plan.append(_floats(name, kind, make))
      continue
    try:
      half = ggml_blocks.half_scales(matrix.scale_S)
    except ValueError as error:
      raise ValueError(f"{name}: {error}; give types='f32'") from None
    if kind in BLOCK_TYPES:
      make = functools.partial(_blocks, matrix, order, kind)
      planned = Planned(
        layout.tensor_name(name), kind, matrix.codes_NK.shape, make
      )
    else:
      planned = _floats(name, kind, functools.partial(_dense, matrix, order))
    plan.append(planned._replace(change=half.change))
  return plan


def _check_types(config: ModelConfig, types: str, embedding: str, head: str):
  for argument, kind, known in (
    ('types', types, get_args(Types)),
    ('embedding', embedding, get_args(FloatTypes)),
    ('head', head, get_args(FloatTypes)),
  ):
    if kind not in known:
      raise ValueError(f'{argument}={kind!r} is none of {", ".join(known)}')
    if kind == 'q8_0' and config.d_model % 32:
      raise ValueError(
        f'{argument}=q8_0 has blocks of 32, and model.d_model='
        f'{config.d_model} is no whole number of them; give {argument}=f16'
      )
  if config.family == 'float' and types in BLOCK_TYPES:
    raise ValueError(
      f"types={types!r} holds -1, 0 and 1, and model.family='float' has other "
      "weights; give types='f16' or 'f32'"
    )


def _matrix_type(
  name: str, matrix: Matrix, types: Types, otherwise: Otherwise | None
) -> str:
  """`types`, or `otherwise` where the blocks do not fit the matrix."""
  problems = []
  for kind in (types, otherwise):
    if kind is None:
      problems.append(
        "give types='q2_0', whose blocks are of 64, or, for such matrices "
        "alone, otherwise='q2_0' or 'f16'"
      )
      break
    if kind not in BLOCK_TYPES:
      return kind
    try:
      N, K = matrix.codes_NK.shape
      ggml_blocks.spread_scales(kind, (N, K), matrix.scale_S, matrix.axis)
      return kind
    except ValueError as error:
      problems.append(str(error))
  raise ValueError(f'{name}: {"; ".join(problems)}')


def _blocks(matrix: Matrix, order: np.ndarray, kind: BlockType) -> np.ndarray:
  """A matrix in blocks, packed some rows at a time."""
  N, K = matrix.codes_NK.shape
  half = ggml_blocks.half_scales(matrix.scale_S).values
  half_NB = ggml_blocks.spread_scales(kind, (N, K), half, matrix.axis)
  data = np.empty((N, ggml_blocks.row_bytes(kind, K)), np.uint8)
  done = 0
  for rows in np.array_split(order, -(-N * K // layout.CHUNK)):
    part = ggml_blocks.pack(kind, matrix.codes_NK[rows], half_NB[rows])
    data[done : done + len(rows)] = part
    done += len(rows)
  return data


def _dense(matrix: Matrix, order: np.ndarray) -> Float32[np.ndarray, 'N K']:
  """Scale times code."""
  _, codes_NK, scale_S, axis = matrix
  along = np.repeat(scale_S, codes_NK.shape[axis == 'in'] // len(scale_S))
  dense_NK = codes_NK * (along[:, None] if axis == 'out' else along)
  return dense_NK[order]


def _reordered(weights_LKN, layer: int, order: np.ndarray) -> np.ndarray:
  return np.asarray(weights_LKN[layer]).T[order]


def _floats(name: str, kind: str, make: Callable[[], np.ndarray]) -> Planned:
  """A tensor that is no blocks of codes."""
  values = make()
  largest = np.abs(values).max()
  if not np.isfinite(largest):
    raise ValueError(f'{name} holds {largest}: its weights are not finite')
  if kind in ('f16', 'q8_0') and largest > 65504:
    raise ValueError(
      f"{name} holds {largest:g}, past float16's 65504; give type 'f32' for it"
    )
  return Planned(layout.tensor_name(name), kind, values.shape, make)
