# SPDX-License-Identifier: Apache-2.0
"""Writes tiny checkpoints and what transformers computes from them.

  .venv/hf/bin/python tests/interop/golden/make.py FOLDER [CASE ...]

`make hf` makes that environment, and compares what is made there with us.

What is committed beside this file was made with torch 2.13.0+cpu, transformers
5.23.0 and safetensors 0.8.0 on Python 3.11.7; each expected.safetensors names
its versions. In FOLDER, each case has a folder of

  config.json, *.safetensors   the checkpoint, weights random
  expected.safetensors         tokens int64 [B, T] and float32 logits [B, T, V],
                               all computed in float32

and `tokenizer.json` stands beside them, of 257 tokens for all. Gains of norms
are random too, else a misplaced norm would go unnoticed, and the weights are so
large that logits depend on every layer. Where activations are rounded to int8
the seed is the first for which none of them is within 1e-4 of a tie: other
orders of summation would fall on the other side.

All are computed by classes of transformers but `old_bitnet`, of 1bitLLM's own
code, which is not among them: `old_bitnet_logits` follows its description
(arXiv 2402.17764 and its "Training Tips, Code and FAQ").
"""

from collections.abc import Callable, Iterator
import contextlib
import itertools
import json
import os
from pathlib import Path
import shutil
import sys

os.environ['TORCHDYNAMO_DISABLE'] = '1'  # nothing here is worth compiling

import safetensors.torch
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
import torch
from torch import nn
import transformers
from transformers.integrations import bitnet

_TIE = 1e-4  # of a level
# What all have but for what a case says.
_SHAPE = {
  'vocab_size': 300,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'max_position_embeddings': 64,
  'initializer_range': 0.15,
  'rms_norm_eps': 1e-5,
  'bos_token_id': 0,
  'eos_token_id': 0,
  'tie_word_embeddings': False,
}


def fresh(kind: str, seed: int, **fields) -> transformers.PreTrainedModel:
  """A model of transformers with random weights and gains, in float32."""
  torch.manual_seed(seed)
  config = getattr(transformers, f'{kind}Config')(**(_SHAPE | fields))
  model = getattr(transformers, f'{kind}ForCausalLM')(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        assert 'norm' in name, name
        parameter.copy_(torch.empty_like(parameter).uniform_(0.5, 1.5))
  return model


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
  """The linear layers of the blocks."""
  for name, module in model.named_modules():
    if isinstance(module, nn.Linear) and name != 'lm_head':
      yield name, module


def codes_and_scale(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """BitNet b1.58: one scale, mean|W|."""
  scale = w.abs().mean().clamp(min=1e-5)
  return (w / scale).round().clamp(-1, 1), scale


def expect(folder: Path, logits: Callable[[torch.Tensor], torch.Tensor]):
  """Writes tokens, and their logits, beside the checkpoint."""
  vocab = json.loads((folder / 'config.json').read_text())['vocab_size']
  generator = torch.Generator().manual_seed(1)
  tokens = torch.randint(1, vocab, (2, 9), generator=generator)
  with torch.no_grad():
    safetensors.torch.save_file(
      {'tokens': tokens, 'logits': logits(tokens).contiguous()},
      folder / 'expected.safetensors',
      {
        'torch': torch.__version__,
        'transformers': transformers.__version__,
        'dtype': 'float32',
      },
    )


def loaded(folder: Path) -> transformers.PreTrainedModel:
  """The model that transformers makes of a folder, in float32."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  )
  # Beside packed matrices the rest keeps the dtype of the file, and its own
  # float() refuses.
  return nn.Module.float(model).eval()


def from_transformers(folder: Path):
  model = loaded(folder)
  expect(folder, lambda tokens: model(tokens).logits)


def llama(folder: Path):
  """Multi-head, untied, in float32 and in shards."""
  model = fresh('Llama', 0, hidden_size=48)
  model.save_pretrained(folder, max_shard_size='100KB')
  from_transformers(folder)


def llama_grouped(folder: Path):
  """Grouped queries, tied, other constants; bfloat16."""
  model = fresh(
    'Llama',
    1,
    num_key_value_heads=2,
    rope_theta=500_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
  )
  model.to(torch.bfloat16).save_pretrained(folder)
  from_transformers(folder)


def trilm(blocks: int) -> Callable[[Path], None]:
  """As SpectraSuite's TriLM_*_Unpacked: ternary values, a scale a block."""

  def make(folder: Path):
    width = {2: 64, 3: 48}[blocks]
    heads = {2: 4, 3: 6}[blocks]
    model = fresh(
      'Llama',
      2 + blocks,
      vocab_size=384,
      hidden_size=width,
      num_attention_heads=heads,
      num_key_value_heads=heads,
      pretraining_model_parallel=blocks,
    )
    with torch.no_grad():
      for name, module in matrices(model):
        axis = 1 if name.endswith(('o_proj', 'down_proj')) else 0
        parts = []
        for n, part in enumerate(module.weight.chunk(blocks, axis)):
          # Scales that differ by more than a trained model's.
          scale = 1e-5 + part.abs().mean() * (1 + n / 2)
          parts.append((part / scale).clamp(-1, 1).round() * scale)
        module.weight.copy_(torch.cat(parts, axis))
    model.to(torch.float16).save_pretrained(folder)
    from_transformers(folder)

  return make


def qwen3(folder: Path):
  """A norm on each query and key head, which is wider than D / H."""
  model = fresh('Qwen3', 6, num_key_value_heads=2, head_dim=24)
  model.to(torch.bfloat16).save_pretrained(folder)
  from_transformers(folder)


@contextlib.contextmanager
def ties(model: nn.Module) -> Iterator[list[float]]:
  """How near, in levels, activations come to a tie of their rounding."""
  nearest: list[float] = []

  def look(module, inputs):
    [x] = inputs
    x = x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5))
    nearest.append(float((x - x.floor() - 0.5).abs().min()))

  hooks = [
    module.register_forward_pre_hook(look)
    for module in model.modules()
    if isinstance(module, (bitnet.AutoBitLinear, bitnet.BitLinear))
  ]
  assert hooks
  yield nearest
  for hook in hooks:
    hook.remove()


def far_from_ties(
  folder: Path, write: Callable[[int], None]
) -> transformers.PreTrainedModel:
  """Writes the first seed's checkpoint that has none near, and loads it."""
  for seed in itertools.count(100):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write(seed)
    model = loaded(folder)
    with ties(model) as nearest:
      expect(folder, lambda tokens, model=model: model(tokens).logits)
    if min(nearest) > _TIE:
      return model
  raise AssertionError


def save(folder: Path, model: transformers.PreTrainedModel, tensors: dict):
  """A checkpoint of other tensors than the model's own."""
  model.config.architectures = [type(model).__name__]
  model.config.save_pretrained(folder)
  safetensors.torch.save_file(
    {name: tensor.contiguous() for name, tensor in tensors.items()},
    folder / 'model.safetensors',
    {'format': 'pt'},
  )


def packed(kind: str, linear_class: str, **fields) -> Callable[[Path], None]:
  """Four codes a byte, in the two senses of `weight_scale`."""

  def make(folder: Path):
    def write(seed: int):
      model = fresh(kind, seed, num_key_value_heads=2, **fields)
      model.config.quantization_config = {
        'quant_method': 'bitnet',
        'linear_class': linear_class,
        'quantization_mode': 'offline',
        'modules_to_not_convert': ['lm_head'],
      }
      if linear_class == 'bitlinear':  # as those that came before the other
        for name in 'linear_class', 'quantization_mode':
          del model.config.quantization_config[name]
      state = model.to(torch.bfloat16).state_dict()
      if fields.get('tie_word_embeddings'):
        del state['lm_head.weight']
      for name, module in matrices(model):
        codes, scale = codes_and_scale(module.weight.detach().float())
        if linear_class == 'bitlinear':
          scale = 1 / scale
        state[f'{name}.weight'] = bitnet.pack_weights(codes)
        state[f'{name}.weight_scale'] = scale.to(torch.bfloat16)[None]
      save(folder, model, state)

    far_from_ties(folder, write)

  return make


def bitnet_online(folder: Path):
  """As microsoft/bitnet-b1.58-2B-4T-bf16: latents, quantised when used."""

  def write(seed: int):
    model = fresh(
      'BitNet', seed, num_key_value_heads=2, tie_word_embeddings=True
    )
    model.config.quantization_config = {
      'quant_method': 'bitnet',
      'linear_class': 'autobitlinear',
      'quantization_mode': 'online',
    }
    state = model.to(torch.bfloat16).state_dict()
    del state['lm_head.weight']
    save(folder, model, state)

  far_from_ties(folder, write)


def old_bitnet_logits(
  state: dict[str, torch.Tensor], heads: int, tokens: torch.Tensor
) -> torch.Tensor:
  """The logits of 1bitLLM's reproduction, from its latents."""

  def linear(x, name):
    w = state[f'{name}.weight']
    inverse = 1 / w.abs().mean().clamp(min=1e-5)
    w = (w * inverse).round().clamp(-1, 1) / inverse
    s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return ((x * s).round().clamp(-128, 127) / s) @ w.T

  def norm(x, name):
    mean = x.square().mean(-1, keepdim=True)
    return x / (mean + 1e-5).sqrt() * state[f'{name}.weight']

  x = state['model.embed_tokens.weight'][tokens]
  B, T, D = x.shape
  half = D // heads // 2
  angle = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(half) / half))

  def turned(x):
    a, b = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

  later = torch.ones(T, T, dtype=torch.bool).triu(1)
  for layer in itertools.count():
    block = f'model.layers.{layer}'
    if f'{block}.input_layernorm.weight' not in state:
      break
    y = norm(x, f'{block}.input_layernorm')
    q, k, v = (
      linear(y, f'{block}.self_attn.{n}_proj').view(B, T, heads, -1)
      .transpose(1, 2) for n in 'qkv'
    )  # fmt: skip
    scores = turned(q) @ turned(k).transpose(2, 3) * (2 * half) ** -0.5
    y = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    y = norm(y.transpose(1, 2).reshape(B, T, D),
             f'{block}.self_attn.inner_attn_ln')  # fmt: skip
    x = x + linear(y, f'{block}.self_attn.o_proj')
    y = norm(x, f'{block}.post_attention_layernorm')
    y = nn.functional.silu(linear(y, f'{block}.mlp.gate_proj')) * linear(
      y, f'{block}.mlp.up_proj'
    )
    y = norm(y, f'{block}.mlp.ffn_layernorm')
    x = x + linear(y, f'{block}.mlp.down_proj')
  return norm(x, 'model.norm') @ state['model.embed_tokens.weight'].T


def old_bitnet(folder: Path):
  """1bitLLM/bitnet_b1_58-*: latents, SwiGLU, its own names and config."""

  def write(seed: int):
    model = fresh('BitNet', seed, tie_word_embeddings=True, hidden_act='silu')
    model.config.quantization_config = {
      'quant_method': 'bitnet',
      'linear_class': 'autobitlinear',
      'quantization_mode': 'online',
    }
    state = model.to(torch.float16).state_dict()
    del state['lm_head.weight']
    save(folder, model, state)

  # transformers' BitNet with another activation is the same function.
  model = far_from_ties(folder, write)
  names = {
    'attn_sub_norm': 'inner_attn_ln',
    'ffn_sub_norm': 'ffn_layernorm',
  }
  half = safetensors.torch.load_file(folder / 'model.safetensors')
  state = {}
  for name, tensor in half.items():
    for theirs, old in names.items():
      name = name.replace(theirs, old)
    state[name] = tensor
  heads = model.config.num_attention_heads
  config = {
    'architectures': ['BitnetForCausalLM'],
    'model_type': 'llama',
    'hidden_act': 'silu',
    'input_bits': 8,
    'weight_bits': 1,
    'rope_theta': 10_000.0,
    'rope_scaling': None,
    'torch_dtype': 'float16',
    'tie_word_embeddings': True,
  }
  (folder / 'config.json').write_text(
    json.dumps(_SHAPE | config, indent=2) + '\n'
  )
  safetensors.torch.save_file(
    state, folder / 'model.safetensors', {'format': 'pt'}
  )
  state = {name: tensor.float() for name, tensor in state.items()}
  expect(folder, lambda tokens: old_bitnet_logits(state, heads, tokens))


CASES: dict[str, Callable[[Path], None]] = {
  'llama': llama,
  'llama_grouped': llama_grouped,
  'trilm_2': trilm(2),
  'trilm_3': trilm(3),
  'qwen3': qwen3,
  'bitnet': packed('BitNet', 'autobitlinear', tie_word_embeddings=True),
  'bitnet_online': bitnet_online,
  'bitlinear': packed('Llama', 'bitlinear'),
  'old_bitnet': old_bitnet,
}


def tokenizer() -> tokenizers.Tokenizer:
  """Bytes and the end of a text."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {'<|endoftext|>': 0} | {c: n + 1 for n, c in enumerate(alphabet)}
  made = tokenizers.Tokenizer(models.BPE(vocab, []))
  made.add_special_tokens(['<|endoftext|>'])
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  return made


def main():
  if len(sys.argv) < 2:
    raise SystemExit(__doc__)
  folder = Path(sys.argv[1])
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in sys.argv[2:] or CASES:
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).mkdir(parents=True)
    CASES[name](folder / name)
    (folder / name / 'generation_config.json').unlink(missing_ok=True)
  tokenizer().save(str(folder / 'tokenizer.json'), pretty=False)


if __name__ == '__main__':
  main()
