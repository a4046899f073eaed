# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: a packed file's, Hugging Face's, and places in parameters.

Our names are those of `checkpoint.packed_file`: `layers.<i>.<linear>`,
`layers.<i>.<norm>`, `norm`, `embed` and `head`. Hugging Face's are those of
its Llama, which Mistral, Qwen3 and BitNet share; only the two norms inside a
block of BitNet have other names in the reproduction by 1bitLLM.
"""

from typing import NamedTuple

from tritera_jax.model.config import ModelConfig

OLD_BITNET = 'BitnetForCausalLM'  # 1bitLLM's, and not transformers' BitNet

_LINEARS = {
  'attention.q': 'self_attn.q_proj',
  'attention.k': 'self_attn.k_proj',
  'attention.v': 'self_attn.v_proj',
  'attention.o': 'self_attn.o_proj',
  'mlp.gate': 'mlp.gate_proj',
  'mlp.up': 'mlp.up_proj',
  'mlp.down': 'mlp.down_proj',
}
_SUB_NORMS = {
  'attention.sub_norm': 'self_attn.attn_sub_norm',
  'mlp.sub_norm': 'mlp.ffn_sub_norm',
}
_OLD_SUB_NORMS = {
  'attention.sub_norm': 'self_attn.inner_attn_ln',
  'mlp.sub_norm': 'mlp.ffn_layernorm',
}


class Tensor(NamedTuple):
  """A parameter, or one layer's part of one, and what it is called elsewhere.

  Attributes:
    name: ours.
    theirs: Hugging Face's, with `.weight` at its end.
    shape: there; of a matrix [outputs, inputs].
    path: of the leaf in `decoder.Params`.
    layer: its place on the leaf's first axis; None: the leaf has no such axis.
    transposed: the leaf has inputs before outputs.
    linear: its name in `ModelConfig.linears`, if it is one of them.
  """

  name: str
  theirs: str
  shape: tuple[int, ...]
  path: tuple[str, ...]
  layer: int | None
  transposed: bool
  linear: str | None

  @property
  def module(self) -> str:
    """Of the tensor there: its name without `.weight`."""
    return self.theirs.removesuffix('.weight')


def tensors(config: ModelConfig, architecture: str) -> dict[str, Tensor]:
  """Every tensor of a model by our name, in the order of the forward pass.

  Args:
    config: the model's.
    architecture: of Hugging Face's config.json.
  """
  D, V = config.d_model, config.padded_vocab_size
  found = [
    Tensor(
      'embed', 'model.embed_tokens.weight', (V, D), ('embed', 'embedding'),
      None, False, None,
    )
  ]  # fmt: skip
  for layer in range(config.layers):
    found += _block(config, architecture, layer)
  found += [
    Tensor(
      'norm', 'model.norm.weight', (D,), ('norm', 'scale'), None, False, None
    ),
    Tensor(
      'head', 'lm_head.weight', (V, D), ('head', 'kernel'), None, True, None
    ),
  ]
  return {tensor.name: tensor for tensor in found}


def _block(config: ModelConfig, architecture: str, layer: int) -> list[Tensor]:
  D, h = config.d_model, config.head_dim
  ours, theirs = f'layers.{layer}', f'model.layers.{layer}'

  def norm(name: str, there: str, width: int) -> Tensor:
    return Tensor(
      f'{ours}.{name}', f'{theirs}.{there}.weight', (width,),
      ('layers', *name.split('.'), 'scale'), layer, False, None,
    )  # fmt: skip

  def linear(name: str) -> Tensor:
    spec = config.linears[name]
    return Tensor(
      f'{ours}.{name}',
      f'{theirs}.{_LINEARS[name]}.weight',
      (spec.out_features, spec.in_features),
      ('layers', *name.split('.'), 'kernel'),
      layer,
      True,
      name,
    )

  sub_norms = _OLD_SUB_NORMS if architecture == OLD_BITNET else _SUB_NORMS
  found = []
  if not config.input_norm:
    found.append(norm('attention_norm', 'input_layernorm', D))
  found += [linear(f'attention.{x}') for x in 'qkv']
  if config.qk_norm:
    found += [norm(f'attention.{x}_norm', f'self_attn.{x}_norm', h)
              for x in 'qk']  # fmt: skip
  if config.sub_norm:
    name = 'attention.sub_norm'
    found.append(norm(name, sub_norms[name], config.heads * h))
  found.append(linear('attention.o'))
  if not config.input_norm:
    found.append(norm('mlp_norm', 'post_attention_layernorm', D))
  found += [linear('mlp.gate'), linear('mlp.up')]
  if config.sub_norm:
    found.append(norm('mlp.sub_norm', sub_norms['mlp.sub_norm'], config.d_ff))
  return [*found, linear('mlp.down')]
