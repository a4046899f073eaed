# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints in the layouts that others publish.

Written from transformers 5.23 (`models/{llama,qwen3,bitnet}`,
`integrations/bitnet.py`) and the README of SpectraSuite; NumPy alone.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from tritera_jax.data import tokenizer as tokenizer_lib

D, F, H, G, h, L, V = 48, 96, 4, 2, 12, 2, 384
LINEARS = {
  'self_attn.q_proj': (H * h, D),
  'self_attn.k_proj': (G * h, D),
  'self_attn.v_proj': (G * h, D),
  'self_attn.o_proj': (D, H * h),
  'mlp.gate_proj': (F, D),
  'mlp.up_proj': (F, D),
  'mlp.down_proj': (D, F),
}
BLOCKED_COLUMNS = ('o_proj', 'down_proj')
BITNET = {'quant_method': 'bitnet', 'modules_to_not_convert': ['lm_head']}


def config(**fields) -> dict:
  """Of a Llama, as transformers 4 writes it."""
  return {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
    'vocab_size': V, 'hidden_size': D, 'intermediate_size': F,
    'num_hidden_layers': L, 'num_attention_heads': H,
    'num_key_value_heads': G, 'hidden_act': 'silu', 'rms_norm_eps': 1e-5,
    'max_position_embeddings': 32, 'rope_theta': 10000.0,
    'tie_word_embeddings': False, 'torch_dtype': 'float16', **fields,
  }  # fmt: skip


KINDS = {
  'llama': config(rope_scaling=None, attention_bias=False),
  # A FloatLM and TriLMs of one and of two scales a matrix.
  'trilm': config(pretraining_model_parallel=1, bos_token_id=0),
  'trilm_2': config(pretraining_model_parallel=2, rotary_pct=1.0),
  'qwen3': config(
    architectures=['Qwen3ForCausalLM'], model_type='qwen3', head_dim=h,
    rope_parameters={'rope_type': 'default', 'rope_theta': 1e6},
    rope_theta=None, use_sliding_window=False,
  ),
  'bitnet': config(
    architectures=['BitNetForCausalLM'], model_type='bitnet',
    hidden_act='relu2', tie_word_embeddings=True, rope_theta=5e5,
    quantization_config={
      **BITNET, 'linear_class': 'autobitlinear', 'quantization_mode': 'offline',
    },
  ),
  'bitnet_master': config(
    architectures=['BitNetForCausalLM'], model_type='bitnet',
    hidden_act='relu2', tie_word_embeddings=True, rope_theta=5e5,
    quantization_config={
      **BITNET, 'linear_class': 'autobitlinear', 'quantization_mode': 'online',
    },
  ),
  'bitlinear': config(quantization_config=BITNET),
  'b1_58': config(
    architectures=['BitnetForCausalLM'], weight_bits=1, input_bits=8,
    tie_word_embeddings=True,
  ),
}  # fmt: skip


def pack(codes: np.ndarray) -> np.ndarray:
  """Byte row r: outputs r, r + N/4, ... from the low bits up, code + 1."""
  quarter = len(codes) // 4
  packed = np.zeros((quarter, codes.shape[1]), np.uint8)
  for output, row in enumerate(codes):
    packed[output % quarter] |= (row + 1).astype(np.uint8) << (
      2 * (output // quarter)
    )
  return packed


def tensors(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
  """A checkpoint's tensors, random."""
  rng = np.random.default_rng(seed)
  found = {}
  half = np.float16 if kind in ('llama', 'trilm', 'trilm_2') else (
    ml_dtypes.bfloat16
  )  # fmt: skip

  def gains(name, width):
    found[f'{name}.weight'] = (1 + 0.1 * rng.normal(size=width)).astype(half)

  def matrix(name, shape):
    weights = 0.1 * rng.normal(size=shape)
    codes = rng.integers(-1, 2, shape, np.int8)
    if kind.startswith('trilm'):
      blocks = int(kind == 'trilm_2') + 1
      axis = int(name.endswith(BLOCKED_COLUMNS))
      scales = rng.uniform(0.05, 0.1, blocks).astype(half)
      spread = np.repeat(scales, shape[axis] // blocks)
      weights = codes * (spread[None] if axis else spread[:, None])
    elif kind in ('bitnet', 'bitlinear'):
      weights = pack(codes)
      scale = rng.uniform(0.05, 0.1, 1)
      scale = 1 / scale if kind == 'bitlinear' else scale
      found[f'{name}.weight_scale'] = scale.astype(half)
    if weights.dtype != np.uint8:
      weights = weights.astype(half)
    found[f'{name}.weight'] = weights

  matrix_free = kind.startswith(('bitnet', 'b1_58'))
  found['model.embed_tokens.weight'] = rng.normal(size=(V, D)).astype(half)
  for layer in range(L):
    block = f'model.layers.{layer}'
    for name, shape in LINEARS.items():
      matrix(f'{block}.{name}', shape)
    gains(f'{block}.input_layernorm', D)
    gains(f'{block}.post_attention_layernorm', D)
    if kind == 'qwen3':
      gains(f'{block}.self_attn.q_norm', h)
      gains(f'{block}.self_attn.k_norm', h)
    if kind.startswith('bitnet'):
      gains(f'{block}.self_attn.attn_sub_norm', D)
      gains(f'{block}.mlp.ffn_sub_norm', F)
    if kind == 'b1_58':
      gains(f'{block}.self_attn.inner_attn_ln', D)
      gains(f'{block}.mlp.ffn_layernorm', F)
      found[f'{block}.self_attn.rotary_emb.inv_freq'] = np.ones(6, 'f')
  gains('model.norm', D)
  if not matrix_free:
    found['lm_head.weight'] = (0.1 * rng.normal(size=(V, D))).astype(half)
  return found


def write(
  folder: Path,
  settings: dict,
  found: dict[str, np.ndarray],
  *,
  shards: int = 1,
  tokenizer: Path | None = None,
) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(settings))
  if tokenizer is None:
    words = tokenizer_lib.train_tokenizer(['one two three'] * 3, V)
    words.save(str(folder / 'tokenizer.json'))
  else:
    (folder / 'tokenizer.json').write_bytes(tokenizer.read_bytes())
  found = {name: np.ascontiguousarray(x) for name, x in found.items()}
  if shards == 1:
    safetensors.numpy.save_file(found, folder / 'model.safetensors')
    return folder
  placed = {
    name: f'model-{n % shards + 1:05}-of-{shards:05}.safetensors'
    for n, name in enumerate(found)
  }
  for file in set(placed.values()):
    part = {name: found[name] for name in found if placed[name] == file}
    safetensors.numpy.save_file(part, folder / file)
  index = {'metadata': {}, 'weight_map': placed}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def weight(kind: str, found: dict, name: str) -> np.ndarray:
  """What a forward pass multiplies by, [outputs, inputs], in float64."""
  stored = found[f'{name}.weight']
  if stored.dtype == np.uint8:
    codes = [(stored >> shift & 3).astype(int) - 1 for shift in (0, 2, 4, 6)]
    scale = float(found[f'{name}.weight_scale'][0])
    return np.concatenate(codes) * (1 / scale if kind == 'bitlinear' else scale)
  return stored.astype(np.float64)
