# SPDX-License-Identifier: Apache-2.0
"""A Decoder whose linear layers multiply by packed codes."""

from flax import nnx
from jaxtyping import Array, Float

from tritera_jax.checkpoint.pack import PackedModel
from tritera_jax.model.decoder import Block, Decoder
from tritera_kernels import matmul
from tritera_kernels.matmul import Activations
from tritera_kernels.packed import PackedTernary


class PackedLinear(nnx.Module):
  """y = ternary_matmul(x, packed); activations are float or int8."""

  def __init__(self, packed: PackedTernary, activations: Activations):
    self.packed = nnx.Param(packed)
    self.activations = activations

  def __call__(self, x: Float[Array, '*batch K']) -> Float[Array, '*batch N']:
    return matmul.ternary_matmul(
      x, self.packed.get_value(), activations=self.activations
    )


def bind(model: PackedModel, activations: Activations | None = None) -> Decoder:
  """The module that computes with a packed model, one leaf per layer.

  Args:
    model: from `checkpoint.pack`.
    activations: default: the packed model's own record.
  """
  config = model.config
  activations = activations or model.activations
  decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(params=0)))
  _set(decoder.embed.embedding, model.rest['embed'])
  _set(decoder.norm.scale, model.rest['norm'])
  _set(decoder.head.kernel, model.rest['head'])

  def block(layer: int) -> Block:
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(params=0)))
    for name, norm in _norms(block).items():
      _set(norm.scale, model.rest[f'layers.{layer}.{name}'])
    for name in config.linears:
      part, linear = name.split('.')
      matrix = model.matrices[f'layers.{layer}.{name}']
      setattr(getattr(block, part), linear, PackedLinear(matrix, activations))
    return block

  decoder.layers = nnx.List([block(i) for i in range(config.layers)])
  return decoder


def _set(parameter: nnx.Param | None, value: Array):
  assert parameter is not None  # an nnx.RMSNorm may have no gain; ours do
  parameter.set_value(value)


def _norms(block: Block) -> dict[str, nnx.RMSNorm]:
  norms = {'attention_norm': block.attention_norm, 'mlp_norm': block.mlp_norm}
  if block.attention.config.qk_norm:
    norms['attention.q_norm'] = block.attention.q_norm
    norms['attention.k_norm'] = block.attention.k_norm
  return norms
