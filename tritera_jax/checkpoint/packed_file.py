# SPDX-License-Identifier: Apache-2.0
"""Packed models on disk: codes in bytes, scales, and the rest.

A packed folder holds `model.safetensors` and the run's `tokenizer.json`, and
nothing else is needed to use it. The tensors are

  layers.<i>.<linear>.packed   uint8   [N, bytes a row]
  layers.<i>.<linear>.scale    float32 [scale blocks]
  layers.<i>.<norm>, norm      float32 [width]
  embed, head                  float32 [V, D] and [D, V], if `head` is float
  {embed,head}.packed          uint8   [V, D], if `head` is int8: weight + 128
  {embed,head}.scale           float32 [V]

and the header's metadata states, as strings: `kind`, `version`, `format`,
`layout_version`, `activations`, `head`, `model` (the ModelConfig as JSON),
`fingerprint` (of codes and scales: `tritera_kernels.fingerprint`) and
`bytes_digest`: in hex the SHA-256 of the fingerprint, a zero byte and then,
for each tensor in the order of the names' UTF-8 bytes, its name, a zero byte
and its bytes.

The fingerprint is proved when a model is packed. Proving it again would
unpack and hash five times the bytes, so that reading checks `bytes_digest`:
these are the bytes that were packed. Version '1' had no `head` (it was float)
and no `bytes_digest`: there the fingerprint is proved at reading.
"""

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
import shutil
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import pydantic
import safetensors
import safetensors.numpy

from tritera_jax.model.config import ModelConfig
from tritera_kernels import arena as arena_lib
from tritera_kernels import byte_matrix, fingerprint, formats, packed
from tritera_kernels.byte_matrix import ByteMatrix
from tritera_kernels.matmul import ACTIVATIONS, Activations
from tritera_kernels.packed import PackedTernary

KIND, VERSION = 'tritera-packed', '2'
Head = Literal['int8', 'float']
_DTYPES = {'U8': np.uint8, 'F32': np.float32}


@dataclasses.dataclass(frozen=True)
class PackedModel:
  """A packed model in memory.

  Invariants: `matrices` has one PackedTernary for each layer and linear, by
  the name 'layers.<i>.<linear>'; `rest` has every other parameter, by the
  names of the file, where 'embed' and 'head' are either float32 arrays or
  both a ByteMatrix of V rows.
  """

  config: ModelConfig
  format: str
  activations: Activations
  matrices: dict[str, PackedTernary]
  rest: dict[str, Any]
  fingerprint: str

  @property
  def head(self) -> Head:
    return 'int8' if isinstance(self.rest['head'], ByteMatrix) else 'float'


def packed_fingerprint(matrices: dict[str, PackedTernary]) -> str:
  """Fingerprint of the codes and scales decoded from packed bytes."""
  return fingerprint.trit_fingerprint(
    (name, *packed.unpack(matrix), matrix.scale_axis)
    for name, matrix in matrices.items()
  )


def _bytes_digest(proof: str, tensors: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256(proof.encode() + b'\0')
  for name in sorted(tensors, key=str.encode):
    digest.update(name.encode() + b'\0')
    digest.update(tensors[name])
  return digest.hexdigest()


def copy_tokenizer(tokenizer: str | Path, folder: Path):
  """Copies a tokenizer.json, and what is said beside it of its end."""
  shutil.copy(tokenizer, folder / 'tokenizer.json')
  end = Path(tokenizer).with_name('end_of_text.json')
  if end.is_file():
    shutil.copy(end, folder)


def write(model: PackedModel, folder: str | Path, tokenizer: str | Path):
  """Writes a packed folder, and proves what it wrote by reading it back.

  Raises:
    ValueError: what was read back differs; the folder is left unfinished
      (without model.safetensors).
  """
  folder = Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for name, value in {**model.matrices, **model.rest}.items():
    if isinstance(value, PackedTernary | ByteMatrix):
      tensors[f'{name}.packed'] = np.asarray(value.data)
      tensors[f'{name}.scale'] = np.asarray(value.scale)
    else:
      tensors[name] = np.asarray(value)
  tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
  metadata = {
    'kind': KIND,
    'version': VERSION,
    'format': model.format,
    'layout_version': str(formats.get(model.format).LAYOUT_VERSION),
    'activations': model.activations,
    'head': model.head,
    'model': json.dumps(dataclasses.asdict(model.config)),
    'fingerprint': model.fingerprint,
    'bytes_digest': _bytes_digest(model.fingerprint, tensors),
  }
  copy_tokenizer(tokenizer, folder)
  partial = folder / 'model.safetensors.partial'
  safetensors.numpy.save_file(tensors, partial, metadata)
  _read_file(partial)
  partial.rename(folder / 'model.safetensors')


def read(folder: str | Path) -> PackedModel:
  """Reads a packed folder, checking every byte of it.

  On a CPU the weights lie in one piece of memory: see `arena`.

  Raises:
    FileNotFoundError: the folder has no model.safetensors.
    ValueError: not a packed model, an unknown version, format or layout, a
      missing, extra or misshapen tensor, an impossible code or weight, or
      bytes that are not those that were packed.
  """
  file = Path(folder) / 'model.safetensors'
  if not file.is_file():
    raise FileNotFoundError(
      f'{folder} is not a packed folder: it has no model.safetensors'
    )
  return _read_file(file)


def _read_file(file: Path) -> PackedModel:
  try:
    with safetensors.safe_open(file, framework='np') as opened:
      metadata = opened.metadata() or {}
      there = {}
      for name in opened.keys():  # noqa: SIM118
        tensor = opened.get_slice(name)
        there[name] = (tensor.get_dtype(), tuple(tensor.get_shape()))
  except safetensors.SafetensorError as error:
    raise ValueError(f'{file} is not a whole safetensors file: {error}') from (
      None
    )
  stated = _read_metadata(metadata, file)
  wanted = tensor_shapes(stated.config, stated.format, stated.head)
  for name in sorted(wanted.keys() | there.keys()):
    if there.get(name) != wanted.get(name):
      raise ValueError(
        f'{file}: tensor {name}: shape {_shown(there, name, "missing")} there, '
        f'{_shown(wanted, name, "none")} by its metadata'
      )
  proof = metadata.get('fingerprint', '')
  assembled = functools.partial(
    assemble,
    stated.config,
    stated.format,
    stated.activations,
    proof=proof,
  )
  tensors = _fill(file, wanted)
  host = assembled(tensors)
  for name, value in {**host.matrices, **host.rest}.items():
    try:
      if isinstance(value, PackedTernary):
        packed.check(value)
      elif isinstance(value, ByteMatrix):
        byte_matrix.check(value)
    except ValueError as error:
      raise ValueError(f'{file}: {name}: {error}') from None
  model = assembled(arena_lib.on_device(tensors))
  if stated.version == '1':
    made, field = packed_fingerprint(model.matrices), 'fingerprint'
  else:
    made, field = _bytes_digest(proof, tensors), 'bytes_digest'
  if made != metadata.get(field):
    raise ValueError(
      f'{file}: its tensors have {field} {made}, its metadata says '
      f'{metadata.get(field)}; the file is damaged: pack again'
    )
  return model


def _shown(tensors: dict[str, tuple], name: str, otherwise: str) -> str:
  if name not in tensors:
    return otherwise
  dtype, shape = tensors[name]
  return f'{dtype}{list(shape)}'


def new_arrays(
  shapes: dict[str, tuple], *, huge_pages: bool = True
) -> dict[str, np.ndarray]:
  """Arrays for all of `tensor_shapes`, in one arena; to be filled."""
  sizes = {
    name: int(np.prod(shape)) * _DTYPES[dtype]().itemsize
    for name, (dtype, shape) in shapes.items()
  }
  arena = arena_lib.Arena(
    sum(map(arena_lib.aligned, sizes.values())), huge_pages=huge_pages
  )
  return {
    name: arena.take(shape, _DTYPES[dtype])
    for name, (dtype, shape) in shapes.items()
  }


def _fill(file: Path, wanted: dict[str, tuple]) -> dict[str, np.ndarray]:
  """The tensors, of a file whose header safetensors has found sound."""
  tensors = new_arrays(wanted)
  with file.open('rb') as opened:
    start = 8 + int.from_bytes(opened.read(8), 'little')
    header = json.loads(opened.read(start - 8))
    for name, array in tensors.items():
      opened.seek(start + header[name]['data_offsets'][0])
      if opened.readinto(memoryview(array).cast('B')) != array.nbytes:
        raise ValueError(f'{file} was cut short while it was read')
  return tensors


def assemble(
  config: ModelConfig,
  format: str,
  activations: Activations,
  tensors: Mapping[str, Any],
  *,
  proof: str,
) -> PackedModel:
  """The model made of all that `tensor_shapes` lists."""
  matrices, rest = {}, {}
  for name in tensors:
    whole = name.removesuffix('.packed')
    if name.endswith('.scale'):
      continue
    if whole == name:
      rest[name] = tensors[name]
    elif whole in ('embed', 'head'):
      rest[whole] = ByteMatrix(tensors[name], tensors[f'{whole}.scale'])
    else:
      spec = config.linears[whole.split('.', 2)[2]]
      matrices[whole] = PackedTernary(
        data=tensors[name],
        scale=tensors[f'{whole}.scale'],
        shape=(spec.out_features, spec.in_features),
        scale_axis=spec.scale_axis,
        format=format,
        layout_version=formats.get(format).LAYOUT_VERSION,
      )
  return PackedModel(config, format, activations, matrices, rest, proof)


class _Stated(NamedTuple):
  """What a file's metadata says."""

  version: str
  config: ModelConfig
  format: str
  activations: Activations
  head: Head


def _read_metadata(metadata: dict[str, str], file: Path) -> _Stated:
  def refuse(field, wanted) -> NoReturn:
    raise ValueError(
      f'{file}: metadata {field}={metadata.get(field)!r}, wanted {wanted}'
    )

  if metadata.get('kind') != KIND:
    refuse('kind', repr(KIND))
  version = metadata.get('version', '')
  if version not in ('1', VERSION):
    refuse('version', f"'1' or {VERSION!r}; a newer tritera_jax may read it")
  activations = metadata.get('activations')
  if activations not in ACTIVATIONS:
    refuse('activations', ' or '.join(map(repr, ACTIVATIONS)))
  head = 'float' if version == '1' else metadata.get('head')
  if head != 'float' and head != 'int8':
    refuse('head', "'float' or 'int8'")
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
  try:
    check_expressible(config, activations)
  except ValueError as error:
    raise ValueError(f'{file}: metadata model: {error}') from None
  return _Stated(version, config, format, activations, head)


def check_expressible(config: ModelConfig, activations: Activations):
  """Refuses what the fused operations would compute otherwise.

  Raises:
    ValueError: the model has norms that they have not, or was trained with
      int8 activations and is to run with others.
  """
  if config.input_norm:
    raise ValueError(
      'model.input_norm=True is not known to packed models, only False is; '
      'evaluate and generate from the run itself'
    )
  if config.activation_bits == 8 and activations != 'int8':
    raise ValueError(
      f'activations={activations!r}, and model.activation_bits=8 was trained '
      "with int8 ones; give activations='int8'"
    )


def block_norms(config: ModelConfig) -> dict[str, int]:
  """The norms of a layer, by their names in it, and how wide they are."""
  norms = {'attention_norm': config.d_model, 'mlp_norm': config.d_model}
  if config.qk_norm:
    norms |= {f'attention.{x}_norm': config.head_dim for x in 'qk'}
  if config.sub_norm:
    norms['attention.sub_norm'] = config.heads * config.head_dim
    norms['mlp.sub_norm'] = config.d_ff
  return norms


def tensor_shapes(
  config: ModelConfig, format: str, head: Head
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """Every tensor of a packed file: its dtype there, and its shape."""
  D, V = config.d_model, config.padded_vocab_size
  shapes: dict[str, tuple[str, tuple[int, ...]]] = {'norm': ('F32', (D,))}
  if head == 'int8':
    for name in ('embed', 'head'):
      shapes[f'{name}.packed'] = ('U8', (V, D))
      shapes[f'{name}.scale'] = ('F32', (V,))
  else:
    shapes |= {'embed': ('F32', (V, D)), 'head': ('F32', (D, V))}
  for layer in range(config.layers):
    prefix = f'layers.{layer}'
    for norm, width in block_norms(config).items():
      shapes[f'{prefix}.{norm}'] = ('F32', (width,))
    for name, spec in config.linears.items():
      segments = config.scale_blocks if spec.scale_axis == 'in' else 1
      row = packed.row_bytes(format, spec.in_features, segments)
      shapes[f'{prefix}.{name}.packed'] = ('U8', (spec.out_features, row))
      shapes[f'{prefix}.{name}.scale'] = ('F32', (config.scale_blocks,))
  return shapes
