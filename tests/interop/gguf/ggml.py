# SPDX-License-Identifier: Apache-2.0
"""What ggml's graphs `llama` and `qwen3` compute, in NumPy.

Written from llama.cpp's src/models/llama.cpp and qwen3.cpp, and of nothing of
ours. Keys and tensors are read by the `gguf` package, and weights too, but for
block_q2_0, which it does not know. Activations stay float.
"""

from pathlib import Path
from unittest import mock

import gguf
from gguf import gguf_reader
import numpy as np

Q2_0 = 42


def reader(path: Path) -> gguf.GGUFReader:
  """The package's reader, told of a type that it does not know yet."""
  known = gguf_reader.GGMLQuantizationType

  class Known:
    def __getattr__(self, name):
      return getattr(known, name)

    def __call__(self, number):
      return Q2_0 if number == Q2_0 else known(number)

  sizes = {**gguf.GGML_QUANT_SIZES, Q2_0: (64, 18)}
  with (
    mock.patch.object(gguf_reader, 'GGMLQuantizationType', Known()),
    mock.patch.object(gguf_reader, 'GGML_QUANT_SIZES', sizes),
    mock.patch.object(gguf.quants, 'GGML_QUANT_SIZES', sizes),
  ):
    return gguf.GGUFReader(path)


def weights(tensor: gguf.ReaderTensor) -> np.ndarray:
  if tensor.tensor_type != Q2_0:
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
  blocks = tensor.data.reshape(-1, 18)
  d = np.frombuffer(blocks[:, :2].tobytes(), '<f2').astype(np.float32)
  codes = np.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], -1)
  values = d[:, None] * (codes.reshape(-1, 64).astype(np.float32) - 1)
  return values.reshape(len(tensor.data), -1)


def rms_norm(x, gain, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def logits(path: Path, ids: list[int]) -> np.ndarray:
  """Of each position of one sequence, [tokens, vocabulary]."""
  file = reader(path)
  arch = file.fields['general.architecture'].contents()

  def key(name):
    return file.fields[f'{arch}.{name}'].contents()

  w = {tensor.name: weights(tensor) for tensor in file.tensors}
  heads, kv = key('attention.head_count'), key('attention.head_count_kv')
  width, eps = (
    key('rope.dimension_count'),
    key('attention.layer_norm_rms_epsilon'),
  )
  assert width == key('attention.key_length') == key('attention.value_length')
  frequency = key('rope.freq_base') ** (-np.arange(0, width, 2) / width)
  angle = np.arange(len(ids))[:, None] * frequency

  def rope(x):
    """ggml_rope: pairs of neighbours, or for qwen3 (NEOX) of both halves."""
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    neighbours = arch == 'llama'
    a, b = (
      (x[..., 0::2], x[..., 1::2])
      if neighbours
      else (x[..., : width // 2], x[..., width // 2 :])
    )
    turned = np.stack([a * cos - b * sin, a * sin + b * cos], -1)
    if not neighbours:
      turned = np.moveaxis(turned, -1, -2)
    return turned.reshape(x.shape)

  x = w['token_embd.weight'][ids].astype(np.float64)
  future = np.triu(np.ones((len(ids), len(ids)), bool), 1)
  for layer in range(key('block_count')):

    def part(name, layer=layer):
      return w[f'blk.{layer}.{name}.weight']

    y = rms_norm(x, part('attn_norm'), eps)
    q, k, v = (
      (y @ part(f'attn_{name}').T).reshape(len(ids), -1, width)
      for name in 'qkv'
    )
    assert q.shape[1] == heads and k.shape[1] == v.shape[1] == kv
    if arch == 'qwen3':
      q = rms_norm(q, part('attn_q_norm'), eps)
      k = rms_norm(k, part('attn_k_norm'), eps)
    q, k = rope(q), np.repeat(rope(k), heads // kv, axis=1)
    v = np.repeat(v, heads // kv, axis=1)
    scores = np.einsum('thd,shd->hts', q, k) / np.sqrt(width)
    scores = np.where(future, -np.inf, scores)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share /= share.sum(-1, keepdims=True)
    y = np.einsum('hts,shd->thd', share, v).reshape(len(ids), -1)
    x = x + y @ part('attn_output').T
    y = rms_norm(x, part('ffn_norm'), eps)
    gate = y @ part('ffn_gate').T
    y = gate / (1 + np.exp(-gate)) * (y @ part('ffn_up').T)
    x = x + y @ part('ffn_down').T
  x = rms_norm(x, w['output_norm.weight'], eps)
  # A file without a head: the embedding is it (TENSOR_DUPLICATED).
  return x @ w.get('output.weight', w['token_embd.weight']).T
