# SPDX-License-Identifier: Apache-2.0
"""What each linear layer is given on a text, and models quantised by it.

A block at a time, as GPTQ does it (arXiv 2210.17323, section 5): sums of x x^T
are those of the block's own float layers, behind blocks that are quantised
already; then the quantised block makes the next one's inputs. Kept are one
residual vector a token, on the host, and one block's sums.

Shapes: B rows, T tokens, D width, L layers; K inputs, N outputs of a layer.
"""

from collections.abc import Callable, Sequence
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int32
import numpy as np

from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params

type Matrix = Float[np.ndarray, 'K N']
type Quantizer = Callable[[Matrix], Matrix]  # to its values on a grid

# Layers that are given what another one is.
_GIVEN_TO = {
  'attention.k': 'attention.q',
  'attention.v': 'attention.q',
  'mlp.up': 'mlp.gate',
}


def each_matrix(
  config: ModelConfig, params: Params, quantizer: Quantizer
) -> Params:
  """Parameters with every linear layer's matrix quantised by itself."""
  layers = jax.tree.map(np.array, params['layers'])
  for layer in range(config.layers):
    for name in config.linears:
      kernel_KN = _kernel(_slice(layers, layer), name)
      kernel_KN[...] = quantizer(kernel_KN)
  return {**params, 'layers': jax.device_put(layers)}


def block_by_block(
  config: ModelConfig,
  params: Params,
  batches: Sequence[Int32[np.ndarray, '_ T']],
  quantizer_for: Callable[[Float32[np.ndarray, 'K K']], Quantizer],
  progress=iter,
) -> Params:
  """Parameters with every linear layer's matrix quantised for its inputs.

  Args:
    config: of a FloatLM.
    params: its parameters.
    batches: calibration text.
    quantizer_for: makes the quantiser of layers from the sum of x x^T over
      all tokens that they are given.
    progress: wraps the iterable of blocks, as tqdm does.
  """
  layers = jax.tree.map(np.array, params['layers'])
  embed = jax.jit(decoder.bind(config, params).embed)
  streams = [np.asarray(embed(tokens_BT)) for tokens_BT in batches]
  for layer in progress(range(config.layers)):
    block = _slice(layers, layer)
    sums = {
      name: jnp.zeros((spec.in_features,) * 2)
      for name, spec in config.linears.items()
      if name not in _GIVEN_TO
    }
    placed = jax.device_put(block)
    for x_BTD, tokens_BT in zip(streams, batches, strict=True):
      sums = _add_sums(config, placed, x_BTD, tokens_BT, sums)
    quantizers = {}
    for name in config.linears:
      if name in sums:
        quantizers[name] = quantizer_for(np.asarray(sums[name]))
      kernel_KN = _kernel(block, name)
      kernel_KN[...] = quantizers[_GIVEN_TO.get(name, name)](kernel_KN)
    placed = jax.device_put(block)
    streams = [
      np.asarray(_run(config, placed, x_BTD, tokens_BT))
      for x_BTD, tokens_BT in zip(streams, batches, strict=True)
    ]
  return {**params, 'layers': jax.device_put(layers)}


def _slice(layers, layer: int):
  """One block's arrays: views, to be written to."""
  return jax.tree.map(lambda leaf: leaf[layer], layers)


def _kernel(block, name: str) -> Float32[np.ndarray, 'K N']:
  part, leaf = name.split('.')
  return block[part][leaf]['kernel']


def _call(config: ModelConfig, block: nnx.Module, x_BTD, tokens_BT):
  documents_BT = decoder.documents(config, tokens_BT)
  positions_BT = decoder.positions(tokens_BT, documents_BT)
  return block(x_BTD, positions_BT, None, documents_BT)[0]


def _bind(config: ModelConfig, params) -> decoder.Block:
  graphdef, state = nnx.split(
    nnx.eval_shape(lambda: decoder.Block(config, rngs=nnx.Rngs(params=0)))
  )
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def _run(config: ModelConfig, block, x_BTD, tokens_BT):
  return _call(config, _bind(config, block), x_BTD, tokens_BT)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _add_sums(config: ModelConfig, block, x_BTD, tokens_BT, sums):
  sums = dict(sums)

  def watched(name: str, linear):
    def call(x_BTK):
      sums[name] += jnp.einsum(
        'btk,btj->kj',
        x_BTK,
        x_BTK,
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
      )
      return linear(x_BTK)

    return call

  bound = _bind(config, block)
  for name in sums:
    part, leaf = name.split('.')
    owner = getattr(bound, part)
    setattr(owner, leaf, watched(name, getattr(owner, leaf)))
  _call(config, bound, x_BTD, tokens_BT)
  return sums
