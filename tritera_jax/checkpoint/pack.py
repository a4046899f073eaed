# SPDX-License-Identifier: Apache-2.0
"""Packed models on disk: codes in bytes, scales, and the float rest.

A packed folder holds `model.safetensors` and the run's `tokenizer.json`, and
nothing else is needed to use it. The tensors are

  layers.<i>.<linear>.packed   uint8   [N, bytes a row]
  layers.<i>.<linear>.scale    float32 [scale blocks]
  layers.<i>.<norm>, norm, embed, head    float

and the header's metadata states, as strings: `kind`, `version`, `format`,
`layout_version`, `activations`, `model` (the ModelConfig as JSON) and
`fingerprint` (of codes and scales: `tritera_kernels.fingerprint`).
"""

import dataclasses
import json
from pathlib import Path
import shutil
from typing import NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array
import pydantic
import safetensors
import safetensors.flax

from tritera_jax.checkpoint import restore
from tritera_jax.model import flops, quantized
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_kernels import fingerprint, formats, packed
from tritera_kernels.matmul import Activations
from tritera_kernels.packed import PackedTernary

KIND, VERSION = 'tritera-packed', '1'


@dataclasses.dataclass(frozen=True)
class PackedModel:
  """A packed model in memory.

  Invariants: `matrices` has one PackedTernary for each layer and linear, by
  the name 'layers.<i>.<linear>'; `rest` has every other parameter, by the
  names of the file.
  """

  config: ModelConfig
  format: str
  activations: Activations
  matrices: dict[str, PackedTernary]
  rest: dict[str, Array]
  fingerprint: str


def _named_codes(config: ModelConfig, params: Params):
  """(name, codes [N, K], scale, axis) of every matrix, layer by layer."""
  for name, (codes, scale) in jax.jit(
    quantized.codes_and_scales, static_argnums=0
  )(config, params).items():
    axis = config.linears[name].scale_axis
    for layer in range(config.layers):
      yield f'layers.{layer}.{name}', codes[layer].T, scale[layer], axis


def latent_fingerprint(config: ModelConfig, params: Params) -> str:
  """Fingerprint of the codes and scales that the latents stand for."""
  return fingerprint.trit_fingerprint(_named_codes(config, params))


def packed_fingerprint(matrices: dict[str, PackedTernary]) -> str:
  """Fingerprint of the codes and scales decoded from packed bytes."""
  return fingerprint.trit_fingerprint(
    (name, *packed.unpack(matrix), matrix.scale_axis)
    for name, matrix in matrices.items()
  )


def pack_model(
  config: ModelConfig,
  params: Params,
  *,
  format: str,
  activations: Activations = 'float',
) -> PackedModel:
  """Packs a TriLM's latents.

  Args:
    config: of a ternary model.
    params: its latents.
    format: 'two_bit' or 'base_three'.
    activations: what the model is to be run with, unless the caller says.

  Raises:
    ValueError: unknown format, a model that is not ternary, or latents with
      NaN or infinity.
  """
  if config.family != 'ternary':
    raise ValueError(
      f'model.family={config.family!r} cannot be packed; only ternary can'
    )
  matrices = {}
  for name, codes_NK, scale, axis in _named_codes(config, params):
    if not bool(jnp.isfinite(scale).all()):
      raise ValueError(f'{name} has scale {scale}: its latents are not finite')
    matrices[name] = packed.pack(
      codes_NK, scale, format=format, scale_axis=axis
    )
  return PackedModel(
    config,
    format,
    activations,
    matrices,
    _rest(config, params),
    packed_fingerprint(matrices),
  )


def _rest(config: ModelConfig, params: Params) -> dict[str, Array]:
  """Every parameter that is not a linear layer's, by its name in the file."""
  rest = {
    'embed': params['embed']['embedding'],
    'norm': params['norm']['scale'],
    'head': params['head']['kernel'],
  }
  layers = params['layers']
  norms = {
    'attention_norm': layers['attention_norm']['scale'],
    'mlp_norm': layers['mlp_norm']['scale'],
  }
  if config.qk_norm:
    for name in ('q_norm', 'k_norm'):
      norms[f'attention.{name}'] = layers['attention'][name]['scale']
  for name, stacked in norms.items():
    for layer in range(config.layers):
      rest[f'layers.{layer}.{name}'] = stacked[layer]
  return rest


def write(model: PackedModel, folder: str | Path, tokenizer: str | Path):
  """Writes a packed folder, and proves what it wrote by reading it back.

  Raises:
    ValueError: what was read back differs; the folder is left unfinished
      (without model.safetensors).
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {**model.rest}
  for name, matrix in model.matrices.items():
    tensors[f'{name}.packed'] = matrix.data
    tensors[f'{name}.scale'] = matrix.scale
  metadata = {
    'kind': KIND,
    'version': VERSION,
    'format': model.format,
    'layout_version': str(formats.get(model.format).LAYOUT_VERSION),
    'activations': model.activations,
    'model': json.dumps(dataclasses.asdict(model.config)),
    'fingerprint': model.fingerprint,
  }
  shutil.copy(tokenizer, folder / 'tokenizer.json')
  partial = folder / 'model.safetensors.partial'
  safetensors.flax.save_file(tensors, partial, metadata)
  _read_file(partial)
  partial.rename(folder / 'model.safetensors')


def read(folder: str | Path) -> PackedModel:
  """Reads a packed folder, checking every byte of it.

  Raises:
    FileNotFoundError: the folder has no model.safetensors.
    ValueError: not a packed model, an unknown version, format or layout, a
      missing, extra or misshapen tensor, an impossible code, or codes and
      scales that do not match the fingerprint.
  """
  file = Path(folder) / 'model.safetensors'
  if not file.is_file():
    raise FileNotFoundError(
      f'{folder} is not a packed folder: it has no model.safetensors'
    )
  return _read_file(file)


def _read_file(file: Path) -> PackedModel:
  try:
    with safetensors.safe_open(file, framework='flax') as opened:
      metadata = opened.metadata() or {}
      tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file} is not a whole safetensors file: {error}') from (
      None
    )
  config, format, activations = _read_metadata(metadata, file)

  wanted = _tensor_shapes(config, format)
  for name in sorted(wanted.keys() | tensors.keys()):
    there = tensors[name].shape if name in tensors else 'missing'
    here = wanted.get(name, 'none')
    if there != here:
      raise ValueError(
        f'{file}: tensor {name}: shape {there} there, {here} by its metadata'
      )

  matrices = {}
  for name in (n.removesuffix('.packed') for n in wanted if '.packed' in n):
    spec = config.linears[name.split('.', 2)[2]]
    matrices[name] = PackedTernary(
      data=tensors.pop(f'{name}.packed'),
      scale=tensors.pop(f'{name}.scale'),
      shape=(spec.out_features, spec.in_features),
      scale_axis=spec.scale_axis,
      format=format,
      layout_version=int(metadata['layout_version']),
    )
    try:
      packed.check(matrices[name])
    except ValueError as error:
      raise ValueError(f'{file}: {name}: {error}') from None
  proof = packed_fingerprint(matrices)
  if proof != metadata.get('fingerprint'):
    raise ValueError(
      f'{file}: its codes and scales have fingerprint {proof}, its metadata '
      f'says {metadata.get("fingerprint")}; the file is damaged: pack again'
    )
  return PackedModel(config, format, activations, matrices, tensors, proof)


def _read_metadata(
  metadata: dict[str, str], file: Path
) -> tuple[ModelConfig, str, Activations]:
  def refuse(field, wanted) -> NoReturn:
    raise ValueError(
      f'{file}: metadata {field}={metadata.get(field)!r}, wanted {wanted}'
    )

  if metadata.get('kind') != KIND:
    refuse('kind', repr(KIND))
  if metadata.get('version') != VERSION:
    refuse('version', f'{VERSION!r}; a newer tritera_jax may read it')
  activations = metadata.get('activations')
  if activations != 'float' and activations != 'int8':
    refuse('activations', "'float' or 'int8'")
  format = metadata.get('format', '')
  known = formats.get(format).LAYOUT_VERSION
  if metadata.get('layout_version') != str(known):
    refuse('layout_version', repr(str(known)))
  try:
    config = pydantic.TypeAdapter(ModelConfig).validate_json(
      metadata.get('model', ''), strict=True, extra='forbid'
    )
  except ValueError as error:
    raise ValueError(f'{file}: metadata model: {error}') from None
  if config.family != 'ternary':
    refuse('model', "family 'ternary'")
  return config, format, activations


def _tensor_shapes(config: ModelConfig, format: str) -> dict[str, tuple]:
  """Every tensor of a packed file and its shape."""
  D, V = config.d_model, config.padded_vocab_size
  shapes = {'embed': (V, D), 'norm': (D,), 'head': (D, V)}
  per_byte = formats.get(format).CODES_PER_BYTE
  for layer in range(config.layers):
    prefix = f'layers.{layer}'
    shapes |= {f'{prefix}.attention_norm': (D,), f'{prefix}.mlp_norm': (D,)}
    if config.qk_norm:
      head = (config.head_dim,)
      shapes |= {
        f'{prefix}.attention.q_norm': head,
        f'{prefix}.attention.k_norm': head,
      }
    for name, spec in config.linears.items():
      segments = config.scale_blocks if spec.scale_axis == 'in' else 1
      row = segments * -(-(spec.in_features // segments) // per_byte)
      shapes[f'{prefix}.{name}.packed'] = (spec.out_features, row)
      shapes[f'{prefix}.{name}.scale'] = (config.scale_blocks,)
  return shapes


@dataclasses.dataclass(frozen=True)
class PackReport:
  """What `pack` wrote. Bits are a weight of the linear layers, scales in."""

  folder: Path
  format: str
  bits_per_weight: float
  file_bytes: int
  fingerprint: str


def pack(
  run: str | Path,
  format: str = 'two_bit',
  *,
  step: int | None = None,
  activations: Activations = 'float',
) -> PackReport:
  """Packs a run's checkpoint into `<run>/packed/<format>`.

  Raises:
    ValueError: see `pack_model`; or the packed codes and scales are not the
      latents' (a defect of this program, never of the run).
  """
  run = Path(run)
  experiment, params = restore.restore_params(run, step)
  model = pack_model(
    experiment.model, params, format=format, activations=activations
  )
  latent = latent_fingerprint(experiment.model, params)
  if model.fingerprint != latent:
    raise ValueError(
      f'{format} holds {model.fingerprint}, the latents are {latent}'
    )
  folder = run / 'packed' / format
  write(model, folder, run / 'tokenizer.json')
  stored = sum(8 * m.nbytes for m in model.matrices.values())
  return PackReport(
    folder,
    format,
    stored / flops.linear_parameters(experiment.model),
    (folder / 'model.safetensors').stat().st_size,
    model.fingerprint,
  )
