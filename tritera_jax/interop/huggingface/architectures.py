# SPDX-License-Identifier: Apache-2.0
"""Which architecture of transformers computes a model; its config.json.

Meanings are those of `huggingface`, which reads such files.
"""

import dataclasses
from typing import Any, Literal

from tritera_jax.interop.huggingface import names
from tritera_jax.model.config import ModelConfig

Form = Literal['unpacked', 'packed', 'latents']

# Architecture: its model_type, and what is meant where a file says nothing.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
  'LlamaForCausalLM': ('llama', {}),
  'MistralForCausalLM': ('mistral', {'sliding_window': 4096}),
  'Qwen3ForCausalLM': ('qwen3', {'head_dim': 128}),
  'BitNetForCausalLM': ('bitnet', {'rope_theta': 500_000.0}),
  names.OLD_BITNET: ('llama', {}),
}


def architecture(model: ModelConfig) -> str:
  """The architecture of transformers that computes exactly this model.

  Raises:
    ValueError: there is none: the field, and what can be done.
  """
  if model.input_norm:
    raise ValueError(
      'model.input_norm=true is computed by no architecture of transformers; '
      'evaluate and generate from the run itself'
    )
  if model.sub_norm and model.qk_norm:
    raise ValueError(
      'model.sub_norm=true with model.qk_norm=true is computed by no '
      'architecture of transformers; evaluate and generate from the run itself'
    )
  if model.sub_norm and model.heads * model.head_dim != model.d_model:
    raise ValueError(
      f'model.sub_norm=true with {model.heads} heads of {model.head_dim} in '
      f'model.d_model={model.d_model}: the norm of BitNetForCausalLM is as '
      'wide as the model; evaluate and generate from the run itself'
    )
  if model.sub_norm:
    return 'BitNetForCausalLM'
  if model.qk_norm:
    return 'Qwen3ForCausalLM'
  if model.d_model % model.heads:
    raise ValueError(
      f'model.heads={model.heads} does not divide model.d_model='
      f'{model.d_model}, which LlamaForCausalLM refuses; evaluate and generate '
      'from the run itself'
    )
  return 'LlamaForCausalLM'


def config_json(
  model: ModelConfig,
  form: Form,
  *,
  dtype: Literal['float32', 'bfloat16', 'float16'],
  end_of_text: int | None,
  tied: bool = False,
  fingerprint: str | None = None,
) -> dict[str, Any]:
  """The object of a config.json.

  Args:
    model: what the tensors are of.
    form: of the blocks' matrices: 'unpacked', what a forward pass multiplies by
      (beside a weight_scale of 1, if activations are int8); 'packed', four
      codes a byte beside a weight_scale; 'latents', to be quantised in each
      forward pass.
    dtype: of the float tensors.
    end_of_text: token that begins and ends documents.
    tied: there is no head; it is the embedding.
    fingerprint: of codes and scales; None: a FloatLM has none.

  Raises:
    ValueError: no architecture computes this model, or the form does not hold
      it.
  """
  name = architecture(model)
  _check_form(model, form)
  config: dict[str, Any] = {
    'architectures': [name],
    'model_type': ARCHITECTURES[name][0],
    'vocab_size': model.padded_vocab_size,
    'hidden_size': model.d_model,
    'intermediate_size': model.d_ff,
    'num_hidden_layers': model.layers,
    'num_attention_heads': model.heads,
    'num_key_value_heads': model.kv_heads,
    'head_dim': model.head_dim,
    'hidden_act': model.mlp_activation,
    'max_position_embeddings': model.context_length,
    'rms_norm_eps': model.norm_eps,
    'rope_theta': model.rope_theta,
    'rope_scaling': None,
    'attention_bias': False,
    'tie_word_embeddings': tied,
    'initializer_range': model.init_std,
    'bos_token_id': end_of_text,
    'eos_token_id': end_of_text,
    'torch_dtype': dtype,
    'tritera': {
      'model': dataclasses.asdict(model),
      'fingerprint': fingerprint,
    },
  }
  if model.scale_blocks > 1 and model.family != 'float':
    config['pretraining_model_parallel'] = model.scale_blocks
  if model.activation_bits == 8:
    config['quantization_config'] = {
      'quant_method': 'bitnet',
      'linear_class': 'autobitlinear',
      'quantization_mode': 'online' if form == 'latents' else 'offline',
      'modules_to_not_convert': ['lm_head'],
    }
  return config


def _check_form(model: ModelConfig, form: Form):
  if form == 'unpacked':
    return
  if model.activation_bits != 8:
    raise ValueError(
      f'form={form!r} rounds activations to int8 in transformers, and '
      f"model.activation_bits={model.activation_bits} does not; give 'unpacked'"
    )
  if model.family != 'ternary' or model.scale_blocks != 1:
    raise ValueError(
      f"form={form!r} is of 'ternary' matrices with one scale each, and model."
      f'family={model.family!r} has model.scale_blocks={model.scale_blocks}; '
      "give 'unpacked'"
    )
  if form == 'latents' and not model.scale_floor:
    raise ValueError(
      "form='latents' is quantised by transformers with the scale max(mean|W|, "
      "1e-5), and model.scale_floor=false adds 1e-5; give 'packed'"
    )
  for name, spec in model.linears.items():
    if form == 'packed' and spec.out_features % 4:
      raise ValueError(
        f"form='packed' holds four outputs a byte, and {name} has "
        f"{spec.out_features}; give 'unpacked'"
      )
