# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from tests import tiny
from tests.interop import checkpoints
from tritera_jax.interop.huggingface import architectures, config_file
from tritera_jax.model.config import ModelConfig

BITNET = checkpoints.BITNET


def described(kind='llama', **fields):
  return config_file.describe(
    {**checkpoints.KINDS[kind], **fields}, 'config.json'
  )


def test_bitnet_2b_as_microsoft_published_it():
  """Fields of microsoft/bitnet-b1.58-2B-4T."""
  found = config_file.describe(
    {
      'architectures': ['BitNetForCausalLM'], 'model_type': 'bitnet',
      'attention_bias': False, 'attention_dropout': 0.0,
      'bos_token_id': 128000, 'eos_token_id': 128001, 'hidden_act': 'relu2',
      'hidden_size': 2560, 'initializer_range': 0.02,
      'intermediate_size': 6912, 'max_position_embeddings': 4096,
      'num_attention_heads': 20, 'num_hidden_layers': 30,
      'num_key_value_heads': 5, 'rms_norm_eps': 1e-05, 'rope_theta': 500000.0,
      'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
      'vocab_size': 128256, 'quantization_config': {
        'quant_method': 'bitnet', 'linear_class': 'autobitlinear',
        'quantization_mode': 'offline',
      },
    },
    'config.json',
  )  # fmt: skip
  assert found.model == ModelConfig(
    family='float', vocab_size=128256, layers=30, d_model=2560, d_ff=6912,
    heads=20, kv_heads=5, head_dim=128, context_length=4096, vocab_multiple=1,
    mlp_activation='relu2', sub_norm=True, activation_bits=8,
    rope_theta=5e5,
  )  # fmt: skip
  assert (found.weight_scale, found.tied) == ('factor', True)
  assert found.model.padded_vocab_size == 128256


def test_linear_class_says_what_weight_scale_means():
  assert described('bitlinear').weight_scale == 'divisor'
  assert described('bitnet').weight_scale == 'factor'
  assert described('bitnet_master').weight_scale is None
  for kind in ('bitlinear', 'bitnet', 'bitnet_master', 'b1_58'):
    assert described(kind).model.activation_bits == 8
  for kind in ('llama', 'trilm_2', 'qwen3'):
    assert described(kind).model.activation_bits is None


def test_what_is_left_out_is_as_transformers_has_it():
  """LlamaConfig, MistralConfig, Qwen3Config and BitNetConfig of 5.23."""
  bare = {
    name: value
    for name, value in checkpoints.KINDS['llama'].items()
    if name not in ('rope_theta', 'num_key_value_heads', 'tie_word_embeddings')
  }
  model = config_file.describe(bare, 'config.json').model
  assert (model.rope_theta, model.kv_heads, model.head_dim) == (1e4, 4, 12)

  def of(architecture, model_type):
    fields = {**bare, 'architectures': [architecture], 'model_type': model_type}
    return config_file.describe(fields, 'config.json').model

  assert of('Qwen3ForCausalLM', 'qwen3').head_dim == 128
  assert of('BitNetForCausalLM', 'bitnet').rope_theta == 5e5
  # Its window of 4096 is longer than these texts.
  assert of('MistralForCausalLM', 'mistral').rope_theta == 1e4


def test_both_spellings_of_rope():
  for fields in (
    {'rope_theta': 5.0, 'rope_scaling': None},
    {'rope_theta': 5.0, 'rope_scaling': {'type': 'default'}},
    {
      'rope_parameters': {'rope_theta': 5.0, 'rope_type': 'default'},
      'rope_theta': None,
    },
    {'rope_parameters': {'rope_theta': 5.0}, 'rope_theta': 5.0},
  ):
    assert described(**fields).model.rope_theta == 5.0


def bitnet(**fields):
  return {'quantization_config': {**BITNET, **fields}}


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'architectures': ['GPT2LMHeadModel']}, 'GPT2.*those that can are Llama'),
    ({'architectures': None}, 'architectures=None; wanted a list'),
    ({'model_type': 'mistral'}, "LlamaForCausalLM has 'llama'"),
    ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8}}, 'only plain RoPE'),
    ({'rope_parameters': {'full_attention': {}}}, 'rope_parameters=.*plain'),
    ({'rope_parameters': [[]]}, 'rope_parameters='),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 must be 1'),
    ({'attention_bias': True}, 'attention_bias=True is not known'),
    ({'mlp_bias': True}, 'mlp_bias=True is not known'),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not one of silu, swish"),
    ({'hidden_act': ['silu']}, 'hidden_act='),
    ({'hidden_size': 48.0}, 'hidden_size=48.0 must be a whole number'),
    ({'hidden_size': True}, 'hidden_size=True must be a whole number'),
    ({'hidden_size': None}, 'hidden_size=None must be a whole number'),
    ({'num_key_value_heads': 3}, 'model.kv_heads=3 must divide'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0 must be'),
    ({'rms_norm_eps': 0}, 'rms_norm_eps=0 must be a number above 0'),
    ({'rms_norm_eps': '1e-5'}, "rms_norm_eps='1e-5' must be a number"),
    ({'tie_word_embeddings': 'no'}, "tie_word_embeddings='no' must be true"),
    ({'pretraining_model_parallel': 5}, 'scale_blocks=5 does not divide'),
    ({'layer_types': ['sliding_attention'] * 2}, 'layer_types='),
    ({'quantization_config': {'quant_method': 'gptq'}}, "quant_method='gptq'"),
    ({'quantization_config': []}, 'quantization_config=.. must be an object'),
    (bitnet(linear_class='other'), "linear_class='other' is not one of"),
    (bitnet(use_rms_norm=True), 'use_rms_norm=True cannot be imported'),
    (bitnet(modules_to_not_convert=['model.layers.0.mlp']), 'or .*lm_head'),
    (bitnet(modules_to_not_convert=[]), "must have 'lm_head' in it"),
    ({'tritera': {'model': {}}}, 'tritera: '),
    ({'tritera': 3}, 'tritera=3 must be an object'),
    ({'rope_parameters': {'rope_theta': 5.0}}, 'rope_theta=10000.0 beside it'),
  ],
)
def test_other_models_are_refused_by_field_and_value(fields, words):
  with pytest.raises(ValueError, match=f'config.json.*{words}'):
    described(**fields)


def test_sliding_windows_of_mistral_and_qwen_are_refused():
  settings = {**checkpoints.KINDS['llama'], 'model_type': 'mistral',
              'architectures': ['MistralForCausalLM'],
              'max_position_embeddings': 8192}  # fmt: skip
  with pytest.raises(ValueError, match='sliding_window=4096 is not known'):
    config_file.describe(settings, 'config.json')
  config_file.describe({**settings, 'sliding_window': None}, 'config.json')
  with pytest.raises(ValueError, match='use_sliding_window=True'):
    described('qwen3', use_sliding_window=True)


def test_old_bitnet_of_other_widths_is_refused():
  for field in ('weight_bits', 'input_bits'):
    with pytest.raises(ValueError, match=f'{field}=4 is not known'):
      described('b1_58', **{field: 4})


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('{"a": 1, "b": 2, "a": 3}', "the name 'a' occurs twice"),
    ('{"a": NaN}', 'NaN is no number'),
    ('[1]', 'holds list, wanted an object'),
    ('{"a":' * 10_000, 'cannot be read as JSON'),
    ('{', 'cannot be read as JSON'),
    ('"' + ' ' * (4 << 20) + '"', 'at most 4194304 are read'),
  ],
)
def test_text_that_is_no_config_is_refused(text, words, tmp_path):
  file = tmp_path / 'config.json'
  file.write_text(text)
  with pytest.raises(ValueError, match=f'config.json.*{words}'):
    config_file.read_config(file)


PLAIN = dataclasses.replace(tiny.MODEL, qk_norm=False, scale_blocks=1)
BITNET_MODEL = dataclasses.replace(
  PLAIN, mlp_activation='relu2', sub_norm=True, activation_bits=8,
  scale_floor=True,
)  # fmt: skip


def written(model, form='unpacked'):
  return architectures.config_json(
    model, form, dtype='float32', end_of_text=0, fingerprint='trits1:0'
  )


def test_architectures_are_those_that_compute_the_model():
  for fields, architecture in (
    ({}, 'LlamaForCausalLM'),
    ({'mlp_activation': 'relu2', 'scale_blocks': 2}, 'LlamaForCausalLM'),
    ({'qk_norm': True}, 'Qwen3ForCausalLM'),
    ({'sub_norm': True}, 'BitNetForCausalLM'),
  ):
    settings = written(dataclasses.replace(PLAIN, **fields))
    assert settings['architectures'] == [architecture]
    assert 'quantization_config' not in settings
  for form, mode in (
    ('unpacked', 'offline'), ('packed', 'offline'), ('latents', 'online'),
  ):  # fmt: skip
    quantized = written(BITNET_MODEL, form)['quantization_config']
    assert quantized['linear_class'] == 'autobitlinear'
    assert quantized['quantization_mode'] == mode


@pytest.mark.parametrize(
  ('fields', 'form', 'words'),
  [
    (
      {'input_norm': True},
      'unpacked',
      'model.input_norm=true is computed by no',
    ),
    ({'qk_norm': True}, 'unpacked', 'sub_norm=true with model.qk_norm=true'),
    ({'head_dim': 24}, 'unpacked', '4 heads of 24 in model.d_model=48'),
    ({'activation_bits': None}, 'packed', "form='packed' rounds activations"),
    ({'scale_blocks': 2}, 'packed', "scale_blocks=2; give 'unpacked'"),
    ({'scale_floor': False}, 'latents', "adds 1e-5; give 'packed'"),
    ({'d_ff': 98}, 'packed', "mlp.gate has 98; give 'unpacked'"),
  ],
)
def test_what_no_architecture_computes_is_refused(fields, form, words):
  with pytest.raises(ValueError, match=words):
    written(dataclasses.replace(BITNET_MODEL, **fields), form)


def test_our_own_object_must_say_what_the_rest_says():
  model = dataclasses.replace(
    PLAIN, scale_blocks=2, vocab_size=300, document_separator=0
  )
  settings = json.loads(json.dumps(written(model)))
  # As transformers 5 writes it anew.
  settings['rope_parameters'] = {
    'rope_type': 'default', 'rope_theta': settings.pop('rope_theta'),
  }  # fmt: skip
  found = config_file.describe(settings, 'config.json')
  assert (found.model, found.fingerprint) == (model, 'trits1:0')
  settings['intermediate_size'] = 192
  with pytest.raises(ValueError, match='d_ff: 96, 192 beside it'):
    config_file.describe(settings, 'config.json')
