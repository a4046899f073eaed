# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's config.json, read; `architectures` has ours written.

Meanings are those of transformers 5.23: `models/{llama,mistral,qwen3,bitnet}`
and `integrations/bitnet.py`, and of 1bitLLM's own code for its architecture.
In `quantization_config` of method 'bitnet' the same tensor, `weight_scale`,
has two opposite meanings, which `linear_class` tells apart:

  autobitlinear   y = (x' W^T) * weight_scale     weight_scale = mean|W|
  bitlinear       y = (x' W^T) / weight_scale     weight_scale = 1 / mean|W|

where x' is x rounded to int8, token by token. 'online' weights are latents,
quantised in the forward pass with the scale max(mean|W|, 1e-5).

What we write has an object "tritera" with the ModelConfig that it was made
from and its fingerprint; others pass over it.
"""

from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, NoReturn

import pydantic

from tritera_jax import validated
from tritera_jax.interop.huggingface import json_file, names
from tritera_jax.interop.huggingface.architectures import ARCHITECTURES
from tritera_jax.model.config import ModelConfig

ScaleMeaning = Literal['factor', 'divisor']

_ACTIVATIONS: dict[str, Literal['silu', 'relu2']] = {
  'silu': 'silu',
  'swish': 'silu',
  'relu2': 'relu2',
}
_PLAIN_ROPE = {
  'rope_type': 'default', 'type': 'default', 'partial_rotary_factor': 1,
}  # fmt: skip
# Of our models what config.json does not say, or says in other words.
_UNSAID = {
  'family', 'vocab_size', 'vocab_multiple', 'scale_blocks', 'scale_floor',
  'input_norm', 'init_std', 'document_separator', 'dtype',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Description:
  """What a config.json says of the tensors beside it.

  Attributes:
    architecture: first of its `architectures`.
    model: of family 'float' where the file does not say what weights are; its
      scale_blocks is then how many a ternary matrix would have.
    weights: 'ternary', 'latents', or None: the tensors tell.
    weight_scale: what a matrix's tensor of this name does to its outputs;
      None: there are no such tensors.
    tied: the head is the embedding.
    ours: the file is one of ours, and says what the model is.
    fingerprint: of codes and scales, if the file is one of ours.
  """

  architecture: str
  model: ModelConfig
  weights: Literal['ternary', 'latents'] | None
  weight_scale: ScaleMeaning | None
  tied: bool
  ours: bool
  fingerprint: str | None


def read_config(path: str | Path) -> Description:
  """What a config.json says.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not of a model that ours can be: field, value and what
      can be done.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f'{path} is missing; a Hugging Face checkpoint is a folder with '
      'config.json and safetensors'
    )
  return describe(json_file.read(path), str(path))


class _Fields:
  """A config's fields, each of the type that is asked for."""

  def __init__(
    self, found: Mapping[str, Any], where: str, defaults: Mapping[str, Any]
  ):
    self.given, self.found = found, {**defaults, **found}
    self.where = where

  def refuse(self, name: str, words: str) -> NoReturn:
    raise ValueError(f'{self.where}: {name}={self.found.get(name)!r} {words}')

  def integer(self, name: str, default: int | None = None) -> int:
    value = self.found.get(name)
    if value is None:
      value = default
    if type(value) is not int or not 1 <= value < 2**31:
      self.refuse(name, 'must be a whole number from 1 to 2^31 - 1')
    return value

  def number(self, name: str, default: float | None = None) -> float:
    value = self.found.get(name)
    if value is None:
      value = default
    if (
      isinstance(value, bool)
      or not isinstance(value, int | float)
      or not 0 < value < 1e30
    ):
      self.refuse(name, 'must be a number above 0')
    return float(value)

  def one_of(self, name: str, *known: str) -> str:
    value = self.found.get(name)
    if not isinstance(value, str) or value not in known:
      self.refuse(name, f'is not one of {", ".join(known)}')
    return value

  def boolean(self, name: str) -> bool:
    value = self.found.get(name)
    if value not in (None, True, False):
      self.refuse(name, 'must be true or false')
    return bool(value)


def describe(found: Mapping[str, Any], where: str) -> Description:
  """What the object of a config.json says; `where` stands in errors.

  Raises:
    ValueError: see `read_config`.
  """
  architecture = _architecture_of(found, where)
  fields = _Fields(found, where, ARCHITECTURES[architecture][1])
  _check_plain(fields, architecture)
  weights, weight_scale = _quantization(fields, architecture)
  heads, width = (
    fields.integer('num_attention_heads'), fields.integer('hidden_size')
  )  # fmt: skip
  activation = fields.one_of('hidden_act', *_ACTIVATIONS)
  try:
    model = ModelConfig(
      family='ternary' if weights else 'float',
      vocab_size=fields.integer('vocab_size'),
      layers=fields.integer('num_hidden_layers'),
      d_model=width,
      d_ff=fields.integer('intermediate_size'),
      heads=heads,
      kv_heads=fields.integer('num_key_value_heads', heads),
      head_dim=fields.integer('head_dim', width // heads),
      context_length=fields.integer('max_position_embeddings'),
      scale_blocks=fields.integer('pretraining_model_parallel', 1),
      scale_floor=weights is not None,
      vocab_multiple=1,
      qk_norm=architecture == 'Qwen3ForCausalLM',
      mlp_activation=_ACTIVATIONS[activation],
      sub_norm='bitnet' in architecture.lower(),
      activation_bits=8 if weights or weight_scale else None,
      rope_theta=_rope_theta(fields),
      norm_eps=fields.number('rms_norm_eps'),
    )
  except ValueError as error:
    if str(error).startswith(where):
      raise
    raise ValueError(f'{where}: {error}') from None
  described = Description(
    architecture,
    model,
    weights,
    weight_scale,
    tied=fields.boolean('tie_word_embeddings'),
    ours=False,
    fingerprint=None,
  )
  ours = found.get('tritera')
  return described if ours is None else _as_exported(described, ours, where)


def _architecture_of(found: Mapping[str, Any], where: str) -> str:
  stated = found.get('architectures')
  if not isinstance(stated, list) or len(stated) != 1:
    raise ValueError(
      f'{where}: architectures={stated!r}; wanted a list of one of '
      f'{", ".join(ARCHITECTURES)}'
    )
  [architecture] = stated
  if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
    raise ValueError(
      f'{where}: architectures={stated!r} cannot be imported; those that can '
      f'are {", ".join(ARCHITECTURES)}'
    )
  model_type = ARCHITECTURES[architecture][0]
  if found.get('model_type', model_type) != model_type:
    raise ValueError(
      f'{where}: model_type={found["model_type"]!r}, and {architecture} has '
      f'{model_type!r}'
    )
  return architecture


def _check_plain(fields: _Fields, architecture: str):
  """Refuses what would be computed otherwise."""
  for name in ('attention_bias', 'mlp_bias'):
    if fields.boolean(name):
      fields.refuse(name, 'is not known here: linear layers have no bias')
  if architecture == 'Qwen3ForCausalLM':
    if fields.boolean('use_sliding_window'):
      fields.refuse('use_sliding_window', 'is not known here')
  elif architecture == 'MistralForCausalLM':
    window = fields.found['sliding_window']
    if window is not None and (
      fields.integer('sliding_window')
      < fields.integer('max_position_embeddings')
    ):
      fields.refuse(
        'sliding_window',
        'is not known here; if text is to stay shorter than that, set '
        'max_position_embeddings to it',
      )
  kinds = fields.found.get('layer_types')
  if kinds is not None and (
    not isinstance(kinds, list) or any(k != 'full_attention' for k in kinds)
  ):
    fields.refuse('layer_types', "must all be 'full_attention'")
  if fields.found.get('partial_rotary_factor') not in (None, 1):
    fields.refuse('partial_rotary_factor', 'must be 1: RoPE turns whole heads')


def _rope_theta(fields: _Fields) -> float:
  """The base; of transformers 4's fields or 5's."""
  theta = fields.found.get('rope_theta')
  for name in ('rope_scaling', 'rope_parameters'):
    stated = fields.found.get(name)
    if not stated:
      continue
    rest = dict(stated) if isinstance(stated, dict) else {'': stated}
    inner = rest.pop('rope_theta', None)
    outer = fields.given.get('rope_theta')
    if None not in (inner, outer) and inner != outer:
      fields.refuse(
        name, f'and rope_theta={outer!r} beside it differ; delete the wrong one'
      )
    theta = theta if inner is None else inner
    if any(value != _PLAIN_ROPE.get(key) for key, value in rest.items()):
      fields.refuse(
        name,
        'is not known here: only plain RoPE is; a model that was trained '
        'without scaling and is to be used without it has null there',
      )
  fields.found['rope_theta'] = theta
  return fields.number('rope_theta', 10_000.0)


def _quantization(
  fields: _Fields, architecture: str
) -> tuple[Literal['ternary', 'latents'] | None, ScaleMeaning | None]:
  if architecture == names.OLD_BITNET:
    for name, known in (('weight_bits', 1), ('input_bits', 8)):
      if fields.found.get(name) != known:
        fields.refuse(name, f'is not known of {architecture}, only {known} is')
    return 'latents', None
  stated = fields.found.get('quantization_config')
  if stated is None:
    return None, None
  if not isinstance(stated, dict):
    fields.refuse('quantization_config', 'must be an object')
  inner = _Fields(
    stated,
    f'{fields.where}: quantization_config',
    {'linear_class': 'bitlinear', 'quantization_mode': 'offline'},
  )
  if stated.get('quant_method') != 'bitnet':
    inner.refuse(
      'quant_method',
      "cannot be imported, only 'bitnet' can; name the checkpoint before it "
      'was quantised',
    )
  linear = inner.one_of('linear_class', 'bitlinear', 'autobitlinear')
  mode = inner.one_of('quantization_mode', 'offline', 'online')
  if inner.boolean('use_rms_norm'):
    inner.refuse(
      'use_rms_norm',
      'cannot be imported: these norms have gains and stand behind those of '
      'the block',
    )
  _check_modules(inner)
  if linear == 'bitlinear':
    return 'ternary', 'divisor'
  if mode == 'online':
    return 'latents', None
  return None, 'factor'


def _check_modules(inner: _Fields):
  """The head is not quantised, every matrix of a block is."""
  name = 'modules_to_not_convert'
  stated = inner.found.get(name)
  if stated is None:
    return
  known = ['lm_head', 'model.embed_tokens', 'embed_tokens']
  if not isinstance(stated, list) or any(x not in known for x in stated):
    inner.refuse(
      name, "must be null or ['lm_head']: all matrices of a model are ternary"
    )
  if 'lm_head' not in stated:
    inner.refuse(name, "must have 'lm_head' in it: heads are float here")


@dataclasses.dataclass(frozen=True)
class _Exported:
  model: ModelConfig
  fingerprint: str | None


def _as_exported(described: Description, ours: Any, where: str) -> Description:
  """The model of our own object, where the fields beside it say the same."""
  if not isinstance(ours, dict):
    raise ValueError(
      f'{where}: tritera={ours!r} must be an object; delete it if the rest is '
      'right'
    )
  try:
    text = json.dumps(ours)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where}: tritera: {error}') from None
  stated: _Exported = validated.from_json(
    pydantic.TypeAdapter(_Exported), text, f'{where}: tritera'
  )
  model, there = stated.model, described.model
  differing = [
    f'{name}: {getattr(model, name)!r}, {getattr(there, name)!r} beside it'
    for name in (f.name for f in dataclasses.fields(ModelConfig))
    if name not in _UNSAID and getattr(model, name) != getattr(there, name)
  ]
  if model.padded_vocab_size != there.vocab_size:
    differing.append(
      f'padded vocabulary: {model.padded_vocab_size}, {there.vocab_size} '
      'beside it'
    )
  if differing:
    raise ValueError(
      f'{where}: its object "tritera" is of another model '
      f'({"; ".join(differing)}); delete the object if the rest is right'
    )
  return dataclasses.replace(
    described, model=model, ours=True, fingerprint=stated.fingerprint
  )
