# SPDX-License-Identifier: Apache-2.0
"""A random ternary Llama as a GGUF file, for llama.cpp to be timed on.

What it says means nothing, but every block of bytes is a valid one. Needs the
extra `peers`.
"""

import dataclasses
import importlib.metadata
from pathlib import Path

import numpy as np

PACKAGES = ('llama-cpp-python', 'gguf')


@dataclasses.dataclass(frozen=True)
class BlockType:
  """A quantisation of ggml: how many weights a block of how many bytes has."""

  id: int
  weights: int
  bytes: int

  def row_bytes(self, K: int) -> int:
    if K % self.weights:
      raise ValueError(f'{K} inputs are no whole blocks of {self.weights}')
    return K // self.weights * self.bytes


TYPES = {
  'f16': BlockType(1, 1, 2),
  'q6_k': BlockType(14, 256, 210),
  'tq1_0': BlockType(34, 256, 54),
  'tq2_0': BlockType(35, 256, 66),
}
TERNARY = ('tq2_0', 'tq1_0', 'f16')


@dataclasses.dataclass(frozen=True)
class Config:
  """A Llama architecture; by default one of 1.1 billion parameters."""

  d: int = 2048
  ffn: int = 5632
  layers: int = 22
  heads: int = 32
  kv_heads: int = 4
  vocabulary: int = 32000
  context: int = 2048


def require_extra(*packages: str) -> dict[str, str]:
  """The versions of the extra's packages; exits where one is missing."""
  versions = {}
  for package in packages or PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      raise SystemExit(
        f"llama.cpp as a peer needs {package}: pip install 'tritera_jax[peers]'"
      ) from None
  return versions


def random_blocks(
  type: str, rows: int, K: int, rng: np.random.Generator
) -> np.ndarray:
  """Random weights [rows, K] as rows of bytes, of variance 1 / K.

  The ternary types hold -d, 0 and d, equally often, with one d for all.

  Args:
    type: a name in TYPES.
    rows: the number of rows.
    K: the weights of a row; whole blocks.
    rng: the generator.
  """
  block = TYPES[type]
  row_bytes = block.row_bytes(K)
  d = np.float16(np.sqrt(1.5 / K))
  if type == 'f16':
    values = np.array([-d, 0, d], np.float16)
    trits = rng.integers(0, 3, (rows, K), np.uint8)
    return values[trits].view(np.uint8)
  blocks = np.empty((rows * K // block.weights, block.bytes), np.uint8)
  if type == 'q6_k':
    # 6 bits a weight around 32, of which each 16 share an int8 scale: every
    # byte is valid. Uniform in -32..31 has the standard deviation 18.5.
    blocks[:, :192] = rng.integers(0, 256, (len(blocks), 192), np.uint8)
    blocks[:, 192:208] = 64
    d = np.float16(1 / (18.5 * 64 * np.sqrt(K)))
  elif type == 'tq2_0':
    # Four codes 0..2 in a byte.
    codes = np.arange(3, dtype=np.uint8)
    fours = np.add.outer(np.add.outer(codes << 6, codes << 4),
                         np.add.outer(codes << 2, codes)).ravel()  # fmt: skip
    blocks[:, :64] = fours[rng.integers(0, 81, (len(blocks), 64))]
  else:
    # Five base-3 digits v as ceil(256 v / 243); the last four bytes hold four
    # digits each, and a fifth that is 0.
    fives = -(-256 * np.arange(243) // 243)
    blocks[:, :48] = fives[rng.integers(0, 243, (len(blocks), 48))]
    blocks[:, 48:52] = fives[3 * rng.integers(0, 81, (len(blocks), 4))]
  blocks[:, -2:] = np.array([d], '<f2').view(np.uint8)
  return blocks.reshape(rows, row_bytes)


def random_model(
  path: str | Path,
  config: Config = Config(),
  type: str = 'tq2_0',
  head: str = 'q6_k',
  seed: int = 0,
):
  """Writes a random ternary GGUF model, one tensor in memory at a time.

  Args:
    path: the file to write.
    config: the architecture.
    type: the type of the linear layers' weights.
    head: the type of the token embedding and of the output layer.
    seed: of the weights.
  """
  require_extra('gguf')
  import gguf

  head_dim = config.d // config.heads
  kv = config.kv_heads * head_dim
  linear = {
    'attn_q': (config.d, config.d),
    'attn_k': (kv, config.d),
    'attn_v': (kv, config.d),
    'attn_output': (config.d, config.d),
    'ffn_gate': (config.ffn, config.d),
    'ffn_up': (config.ffn, config.d),
    'ffn_down': (config.d, config.ffn),
  }
  tensors = {'token_embd.weight': (head, config.vocabulary, config.d)}
  for layer in range(config.layers):
    for name in ('attn_norm', 'ffn_norm'):
      tensors[f'blk.{layer}.{name}.weight'] = ('f32', 1, config.d)
    for name, (N, K) in linear.items():
      tensors[f'blk.{layer}.{name}.weight'] = (type, N, K)
  tensors['output_norm.weight'] = ('f32', 1, config.d)
  tensors['output.weight'] = (head, config.vocabulary, config.d)

  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_name(f'random ternary {type}')
  writer.add_context_length(config.context)
  writer.add_embedding_length(config.d)
  writer.add_block_count(config.layers)
  writer.add_feed_forward_length(config.ffn)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_rope_dimension_count(head_dim)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(config.vocabulary)
  writer.add_file_type(
    {
      'f16': gguf.LlamaFileType.MOSTLY_F16,
      'tq1_0': gguf.LlamaFileType.MOSTLY_TQ1_0,
      'tq2_0': gguf.LlamaFileType.MOSTLY_TQ2_0,
    }[type]
  )
  # The least of a SentencePiece tokeniser that llama.cpp accepts.
  special = ['<unk>', '<s>', '</s>'] + [f'<0x{i:02X}>' for i in range(256)]
  kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL]
  kinds += 256 * [gguf.TokenType.BYTE]
  filler = config.vocabulary - len(special)
  if filler < 0:
    raise ValueError(f'a vocabulary has at least {len(special)} tokens')
  writer.add_tokenizer_model('llama')
  writer.add_token_list(special + [f'w{i}' for i in range(filler)])
  writer.add_token_scores([0.0] * config.vocabulary)
  writer.add_token_types(kinds + filler * [gguf.TokenType.NORMAL])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)

  for name, (kind, N, K) in tensors.items():
    if kind == 'f32':
      writer.add_tensor_info(name, (K,), np.dtype(np.float32), 4 * K)
    else:
      row_bytes = TYPES[kind].row_bytes(K)
      writer.add_tensor_info(
        name,
        (N, K) if kind == 'f16' else (N, row_bytes),
        np.dtype(np.float16 if kind == 'f16' else np.uint8),
        N * row_bytes,
        None if kind == 'f16' else gguf.GGMLQuantizationType(TYPES[kind].id),
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  rng = np.random.default_rng(seed)
  for kind, N, K in tensors.values():
    if kind == 'f32':
      writer.write_tensor_data(np.ones(K, np.float32))
    else:
      data = random_blocks(kind, N, K, rng)
      writer.write_tensor_data(data.view(np.float16) if kind == 'f16' else data)
  writer.close()
