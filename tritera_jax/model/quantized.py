# SPDX-License-Identifier: Apache-2.0
"""A model's codes and scales, and the float model that computes the same.

Names are those of `ModelConfig.linears`; arrays are stacked over layers.
"""

import functools

import jax
from jaxtyping import Array, Float32, Int8

from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.ternary import quantize


def latents(
  config: ModelConfig, params: Params
) -> dict[str, Float32[Array, 'L K N']]:
  """The latent matrices by name."""

  def kernel(name):
    part, layer = name.split('.')
    return params['layers'][part][layer]['kernel']

  return {name: kernel(name) for name in config.linears}


def codes_and_scales(
  config: ModelConfig, params: Params
) -> dict[str, tuple[Int8[Array, 'L K N'], Float32[Array, 'L S']]]:
  """Codes and scales of every linear layer.

  Raises:
    ValueError: a FloatLM has none.
  """
  if config.family == 'float':
    raise ValueError(
      "model.family='float' has no codes; train a 'ternary' or 'binary' model"
    )
  quantizer = quantize.quantizer(config.family, floor=config.scale_floor)
  return {
    name: jax.vmap(
      functools.partial(
        quantizer,
        blocks=config.scale_blocks,
        axis=config.linears[name].scale_axis,
      )
    )(w_LKN)
    for name, w_LKN in latents(config, params).items()
  }


def effective_params(config: ModelConfig, params: Params) -> Params:
  """Parameters of the FloatLM whose every matrix is scale * codes.

  Its forward pass is the quantised model's without quantising at each call:
  the latents' inference form. Bind it to `dataclasses.replace(config,
  family='float')`. A FloatLM's own parameters come back as they are.
  """
  if config.family == 'float':
    return params
  layers = {name: dict(part) for name, part in params['layers'].items()}
  for name, (codes, scale) in codes_and_scales(config, params).items():
    axis = config.linears[name].scale_axis
    part, layer = name.split('.')
    layers[part][layer] = {
      'kernel': jax.vmap(functools.partial(quantize.dequantize, axis=axis))(
        codes, scale
      )
    }
  return {**params, 'layers': layers}
