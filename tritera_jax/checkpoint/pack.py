# SPDX-License-Identifier: Apache-2.0
"""A run's latents to a packed model; `packed_file` is what lies on disk."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import functools
import operator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int8
import numpy as np

from tritera_jax.checkpoint import packed_file, restore
from tritera_jax.checkpoint.packed_file import Head, PackedModel
from tritera_jax.model import flops, quantized
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.ternary import quantize
from tritera_jax.ternary.quantize import ScaleAxis
from tritera_kernels import byte_matrix, fingerprint, packed
from tritera_kernels.matmul import Activations


class Matrix(NamedTuple):
  """A ternary or binary matrix by its name in a packed file."""

  name: str
  codes_NK: Int8[np.ndarray, 'N K']
  scale_S: Float32[np.ndarray, ' S']
  axis: ScaleAxis


def matrices(config: ModelConfig, params: Params) -> Iterator[Matrix]:
  """Codes and scales that latents stand for, layer by layer.

  Raises:
    ValueError: a FloatLM has none; or latents with NaN or infinity.
  """
  stacked = jax.jit(quantized.codes_and_scales, static_argnums=0)(
    config, params
  )
  for layer in range(config.layers):
    for linear, spec in config.linears.items():
      name = f'layers.{layer}.{linear}'
      codes_LKN, scale_LS = stacked[linear]
      scale_S = np.asarray(scale_LS[layer])
      if not np.isfinite(scale_S).all():
        raise ValueError(
          f'{name} has scale {scale_S}: its latents are not finite'
        )
      codes_NK = np.asarray(codes_LKN[layer]).T
      yield Matrix(name, codes_NK, scale_S, spec.scale_axis)


def seen_scales(
  codes_NK: Int8[np.ndarray, 'N K'],
  scale_S: Float32[np.ndarray, ' S'],
  axis: ScaleAxis,
) -> Float32[np.ndarray, ' S']:
  """Scales, with eps for those of zeros: values do not show them."""
  blocks = np.split(codes_NK, len(scale_S), {'out': 0, 'in': 1}[axis])
  seen_S = np.array([block.any() for block in blocks])
  return np.where(seen_S, scale_S, np.float32(quantize.EPS))


def latent_fingerprint(config: ModelConfig, params: Params) -> str:
  """Fingerprint of the codes and scales that the latents stand for."""
  return fingerprint.trit_fingerprint(matrices(config, params))


def pack_model(
  config: ModelConfig,
  params: Params,
  *,
  format: str,
  activations: Activations | None = None,
  head: Head | None = None,
) -> PackedModel:
  """Packs a TriLM's latents.

  Args:
    config: of a ternary model.
    params: its latents.
    format: 'two_bit' or 'base_three'.
    activations: what the model is to be run with, unless the caller says;
      default: what it was trained with.
    head: 'int8' rounds head and embedding row by row; 'float' leaves them.
      Default: int8 beside int8 activations.

  Raises:
    ValueError: unknown format, a model that is not ternary, one that packed
      models cannot express, or parameters with NaN or infinity.
  """
  if config.family != 'ternary':
    raise ValueError(
      f'model.family={config.family!r} cannot be packed; only ternary can'
    )
  return pack_parts(
    config,
    matrices(config, params),
    rest(config, params),
    format=format,
    activations=activations,
    head=head,
  )


def pack_parts(
  config: ModelConfig,
  parts: Iterable[Matrix],
  rest: Mapping[str, Float32[Array | np.ndarray, '...']],
  *,
  format: str,
  activations: Activations | None = None,
  head: Head | None = None,
) -> PackedModel:
  """Packs matrices one by one.

  Args:
    config: of a ternary model.
    parts: its matrices.
    rest: its other parameters, by the names of `packed_file`, not rounded.
    format: as of `pack_model`, and so activations and head.

  Raises:
    ValueError: packed models cannot express it, or an unknown format.
  """
  if activations is None:
    activations = 'int8' if config.activation_bits == 8 else 'float'
  packed_file.check_expressible(config, activations)
  made = {
    name: packed.pack(
      jnp.asarray(codes_NK),
      jnp.asarray(scale_S),
      format=format,
      scale_axis=axis,
    )
    for name, codes_NK, scale_S, axis in parts
  }
  kept: dict[str, Any] = dict(rest)
  if (head or ('int8' if activations == 'int8' else 'float')) == 'int8':
    kept['embed'] = byte_matrix.quantize_rows(kept['embed'])
    kept['head'] = byte_matrix.quantize_rows(kept['head'].T)
  return PackedModel(
    config,
    format,
    activations,
    made,
    kept,
    packed_file.packed_fingerprint(made),
  )


def rest(
  config: ModelConfig, params: Params
) -> dict[str, Float32[Array, '...']]:
  """Every parameter that is not a linear layer's, by its name in the file."""
  found = {
    'embed': params['embed']['embedding'],
    'norm': params['norm']['scale'],
    'head': params['head']['kernel'],
  }
  for layer in range(config.layers):
    for name in packed_file.block_norms(config):
      stacked = functools.reduce(
        operator.getitem, name.split('.'), params['layers']
      )
      found[f'layers.{layer}.{name}'] = stacked['scale'][layer]
  return found


@dataclasses.dataclass(frozen=True)
class PackReport:
  """What `pack` wrote. Bits are a weight of the linear layers, scales in."""

  folder: Path
  format: str
  bits_per_weight: float
  file_bytes: int
  fingerprint: str

  def __str__(self) -> str:
    return (
      f'{self.folder}: {self.bits_per_weight:.3f} bits/weight, '
      f'{self.file_bytes:,} bytes, {self.fingerprint}'
    )


def pack(
  run: str | Path,
  format: str = 'two_bit',
  *,
  step: int | None = None,
  activations: Activations | None = None,
  head: Head | None = None,
  out: str | Path | None = None,
) -> PackReport:
  """Packs a run's checkpoint into `out`, or else `<run>/packed/<format>`.

  Arguments are those of `pack_model`; the default step is the newest.

  Raises:
    ValueError: see `pack_model`; or the packed codes and scales are not the
      latents' (a defect of this program, never of the run).
  """
  run = Path(run)
  experiment, params = restore.restore_params(run, step)
  model = pack_model(
    experiment.model,
    params,
    format=format,
    activations=activations,
    head=head,
  )
  latent = latent_fingerprint(experiment.model, params)
  if model.fingerprint != latent:
    raise ValueError(
      f'{format} holds {model.fingerprint}, the latents are {latent}'
    )
  folder = Path(out) if out else run / 'packed' / format
  return write(model, folder, run / 'tokenizer.json')


def write(
  model: PackedModel, folder: Path, tokenizer: str | Path
) -> PackReport:
  """Writes and describes a packed folder.

  Raises:
    ValueError: see `packed_file.write`.
  """
  packed_file.write(model, folder, tokenizer)
  stored = sum(8 * m.nbytes for m in model.matrices.values())
  return PackReport(
    folder,
    model.format,
    stored / flops.linear_parameters(model.config),
    (folder / 'model.safetensors').stat().st_size,
    model.fingerprint,
  )
