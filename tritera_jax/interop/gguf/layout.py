# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file of ours holds: ggml's names, the order of rows, our keys.

ggml's RoPE of the architecture `llama` turns channels 2 i and 2 i + 1 of a
head, ours and that of `qwen3` i and i + h/2: there, rows of q and k are in
ggml's order.

Beside ggml's own keys there are

  tritera.version      1
  tritera.model        the ModelConfig as JSON
  tritera.step         of the checkpoint
  tritera.fingerprint  of codes and scales (`tritera_kernels.fingerprint`)
  tritera.scales       float32: each matrix's, layer by layer, in the order of
                       ModelConfig.linears

The last is there because ggml's blocks hold float16 scales: codes and these
are the run's to the bit, whatever was rounded in the blocks. A FloatLM has
neither. Shapes: N outputs, K inputs, S scale blocks, h width of a head.
"""

from collections.abc import Iterator
import contextlib
from typing import NamedTuple

from jaxtyping import Float16, Float32, Int8
import numpy as np
import pydantic

from tritera_jax.checkpoint.pack import Matrix
from tritera_jax.interop.gguf import ggml_blocks
from tritera_jax.interop.gguf.ggml_blocks import BLOCK_TYPES, LAYOUTS
from tritera_jax.interop.gguf.gguf_file import GgufFile, Tensor
from tritera_jax.model.config import ModelConfig
from tritera_jax.validated import from_json

VERSION = 1
CHUNK = 2**22  # codes that are packed or unpacked at once

_NAMES = {
  'attention.q': 'attn_q', 'attention.k': 'attn_k', 'attention.v': 'attn_v',
  'attention.o': 'attn_output', 'mlp.gate': 'ffn_gate', 'mlp.up': 'ffn_up',
  'mlp.down': 'ffn_down', 'attention_norm': 'attn_norm',
  'mlp_norm': 'ffn_norm', 'attention.q_norm': 'attn_q_norm',
  'attention.k_norm': 'attn_k_norm',
}  # fmt: skip


class Place(NamedTuple):
  """A matrix: its name, that of ModelConfig.linears, and its layer."""

  name: str
  linear: str
  layer: int


def matrices(config: ModelConfig) -> Iterator[Place]:
  """Every matrix of a model, in the order of tritera.scales."""
  for layer in range(config.layers):
    for linear in config.linears:
      yield Place(f'layers.{layer}.{linear}', linear, layer)


def row_order(config: ModelConfig, linear: str) -> np.ndarray:
  """Which of our rows is each row there."""
  N, h = config.linears[linear].out_features, config.head_dim
  if config.qk_norm or linear not in ('attention.q', 'attention.k'):
    return np.arange(N)
  return np.arange(N).reshape(-1, 2, h // 2).swapaxes(1, 2).reshape(-1)


def tensor_name(name: str) -> str:
  """ggml's name of one of our tensors."""
  whole = {'embed': 'token_embd', 'norm': 'output_norm', 'head': 'output'}
  if name in whole:
    return f'{whole[name]}.weight'
  _, layer, part = name.split('.', 2)
  return f'blk.{layer}.{_NAMES[part]}.weight'


def read_config(file: GgufFile) -> ModelConfig:
  """The model of a file that `export` wrote.

  Raises:
    ValueError: something else wrote it, or a newer version.
  """
  if 'tritera.model' not in file.metadata:
    raise ValueError(
      f'{file.path} was not exported by tritera: it does not say which scales '
      'its matrices have'
    )
  version = file.value('tritera.version', int)
  if version != VERSION:
    raise ValueError(
      f'{file.path}: tritera.version is {version}, wanted {VERSION}; a newer '
      'tritera_jax may read it'
    )
  return from_json(
    pydantic.TypeAdapter(ModelConfig),
    file.value('tritera.model', str),
    f'{file.path}: tritera.model',
  )


def read_matrices(file: GgufFile) -> Iterator[Matrix]:
  """Codes and scales of a file that `export` wrote, as the run has them.

  Raises:
    ValueError: a matrix is missing, has another shape, weights that are not
      ternary, or scales that are not those that the file states.
  """
  config = read_config(file)
  if config.family == 'float':
    raise ValueError(f'{file.path} holds a FloatLM, which has no codes')
  S = config.scale_blocks
  scales = file.value('tritera.scales', np.ndarray)
  if scales.dtype != np.float32 or len(scales) != S * 7 * config.layers:
    raise ValueError(
      f'{file.path}: tritera.scales has {len(scales)} {scales.dtype}, wanted '
      f'{S * 7 * config.layers} float32'
    )
  for n, place in enumerate(matrices(config)):
    scale_S = np.array(scales[S * n : S * (n + 1)], '<f4')
    with _naming(file, place):
      codes_NK = _read_codes(file, config, place, scale_S)
    axis = config.linears[place.linear].scale_axis
    yield Matrix(place.name, codes_NK, scale_S, axis)


def read_foreign(file: GgufFile, config: ModelConfig) -> Iterator[Matrix]:
  """Codes and scales of a file that something else wrote.

  Args:
    file: of architecture `llama` or `qwen3`, as the model's is.
    config: says where scales lie, which such a file does not.

  Raises:
    ValueError: a matrix is missing, is of another shape or type than ternary
      blocks, or has other scales than one for each block of the model's.
  """
  for place in matrices(config):
    axis = config.linears[place.linear].scale_axis
    with _naming(file, place):
      codes_NK, half_NB = _unpacked(file, config, place)
      half_S = ggml_blocks.gathered_scales(half_NB, config.scale_blocks, axis)
    yield Matrix(place.name, codes_NK, half_S.astype(np.float32), axis)


@contextlib.contextmanager
def _naming(file: GgufFile, place: Place) -> Iterator[None]:
  """Says of which tensor an error is."""
  try:
    yield
  except ValueError as error:
    there = tensor_name(place.name)
    raise ValueError(f'{file.path}: tensor {there}: {error}') from None


def _read_codes(
  file: GgufFile,
  config: ModelConfig,
  place: Place,
  scale_S: Float32[np.ndarray, ' S'],
) -> Int8[np.ndarray, 'N K']:
  """A matrix's codes in our order of rows; its scales must be those stated."""
  axis = config.linears[place.linear].scale_axis
  tensor = _tensor(file, config, place)
  N, K = tensor.shape
  if tensor.type not in BLOCK_TYPES:
    order = row_order(config, place.linear)
    # Rounded to the type of the file, where a code of 1 is the scale.
    kept_S = scale_S
    if tensor.type == 'f16':
      kept_S = ggml_blocks.half_scales(scale_S).values.astype(np.float32)
    along = np.repeat(kept_S, (N if axis == 'out' else K) // len(kept_S))
    dense_NK = file.floats(tensor.name)
    codes_NK = np.empty((N, K), np.int8)
    codes_NK[order] = np.sign(np.nan_to_num(dense_NK))
    expected = codes_NK * (along[:, None] if axis == 'out' else along)
    if not np.array_equal(expected[order], dense_NK):
      raise ValueError('its weights are not the codes times tritera.scales')
    return codes_NK
  half_S = ggml_blocks.half_scales(scale_S).values
  half_NB = ggml_blocks.spread_scales(tensor.type, (N, K), half_S, axis)
  codes_NK, found_NB = _unpacked(file, config, place)
  blank_NB = ~codes_NK.reshape(*found_NB.shape, -1).any(axis=2)
  wrong_NB = found_NB != np.where(blank_NB, 0, half_NB)
  if wrong_NB.any():
    n, b = np.argwhere(wrong_NB)[0]
    raise ValueError(
      f'block {b} of our row {n} has the scale {found_NB[n, b]}, and '
      f'tritera.scales says {half_NB[n, b]}'
    )
  return codes_NK


def _unpacked(
  file: GgufFile, config: ModelConfig, place: Place
) -> tuple[Int8[np.ndarray, 'N K'], Float16[np.ndarray, 'N B']]:
  """Codes and the scales of ggml's blocks, in our order of rows."""
  tensor = _tensor(file, config, place)
  if tensor.type not in BLOCK_TYPES:
    raise ValueError(
      f'is {tensor.type}; only {", ".join(BLOCK_TYPES)} hold codes'
    )
  N, K = tensor.shape
  data = file.rows(tensor.name)
  order = row_order(config, place.linear)
  codes_NK = np.empty((N, K), np.int8)
  half_NB = np.empty((N, K // LAYOUTS[tensor.type].weights), np.float16)
  done = 0
  for rows in np.array_split(order, -(-N * K // CHUNK)):
    part = data[done : done + len(rows)]
    done += len(rows)
    codes_NK[rows], half_NB[rows] = ggml_blocks.unpack(tensor.type, part)
  return codes_NK, half_NB


def _tensor(file: GgufFile, config: ModelConfig, place: Place) -> Tensor:
  spec = config.linears[place.linear]
  tensor = file.tensors.get(tensor_name(place.name))
  if tensor is None or tensor.shape != (spec.out_features, spec.in_features):
    raise ValueError(
      f'is {"missing" if tensor is None else list(tensor.shape)}, wanted '
      f'{[spec.out_features, spec.in_features]}'
    )
  return tensor
