# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's files hold, found out before anything is converted."""

import dataclasses
from pathlib import Path
from typing import Literal

from jaxtyping import Float32, Int8
import numpy as np

from tritera_jax.checkpoint import pack
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.huggingface import (
  matrices,
  names,
  safetensors_file,
)
from tritera_jax.interop.huggingface.config_file import Description
from tritera_jax.interop.huggingface.safetensors_file import TensorFiles
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.quantize import ScaleAxis

Weights = Literal['ternary', 'latents', 'float']
Dtype = Literal['float32', 'bfloat16']

_FEW = 32  # magnitudes
_ROWS = 8  # of a matrix, to see what it is
# Of trained matrices mean|W| is 0.01 to 5, and its reciprocal is what stands in
# files of 'bitlinear': tens.
_LARGEST = 8.0
FLOATS = ('F64', 'F32', 'F16', 'BF16')


def check_tensors(files: TensorFiles, described: Description, folder: Path):
  """Checks that a model's tensors are there, and no others.

  Raises:
    ValueError: some are missing, extra, or of another shape or dtype.
  """
  model = described.model
  # Before as many names are made.
  if model.layers > len(files.tensors):
    raise ValueError(
      f'{folder}: num_hidden_layers={model.layers}, and there are '
      f'{len(files.tensors)} tensors'
    )
  if (
    described.weights == 'latents'
    and described.architecture != names.OLD_BITNET
    and any(
      tensor.linear and files.tensors[tensor.theirs].dtype == 'U8'
      for tensor in names.tensors(model, described.architecture).values()
      if tensor.theirs in files.tensors
    )
  ):
    raise ValueError(
      f'{folder}: matrices are of packed bytes (U8), and by config.json they '
      "are latents; set quantization_mode='offline' in its quantization_config"
    )
  problems, wanted = [], set()
  for tensor in names.tensors(model, described.architecture).values():
    if tensor.name == 'head' and described.tied:
      continue
    wanted.add(tensor.theirs)
    stored = files.tensors.get(tensor.theirs)
    if stored is None:
      problems.append(f'{tensor.theirs} is missing')
      continue
    shape, floats = tensor.shape, stored.dtype in FLOATS
    if tensor.linear and described.weight_scale and stored.dtype == 'U8':
      # Four outputs a byte.
      shape = (shape[0] // 4 if shape[0] % 4 == 0 else -1, *shape[1:])
    elif not floats and not (tensor.linear and described.weight_scale):
      problems.append(
        f'{tensor.theirs} is {stored.dtype}, without a quantization_config of '
        "quant_method 'bitnet' that would say what it means"
      )
      continue
    if stored.shape != shape:
      problems.append(
        f'{tensor.theirs} is {stored.dtype}{list(stored.shape)}, by '
        f'config.json {list(shape)}'
      )
    if tensor.linear and described.weight_scale:
      scale = f'{tensor.module}.weight_scale'
      wanted.add(scale)
      if scale not in files.tensors:
        problems.append(f'{scale} is missing')
      elif files.tensors[scale].shape not in ((), (1,)):
        problems.append(
          f'{scale} has the shape {list(files.tensors[scale].shape)}, wanted '
          'one number'
        )
  for name in files.tensors.keys() - wanted:
    if name == 'lm_head.weight' and described.tied:
      continue
    # Of old checkpoints: it follows from rope_theta.
    if not name.endswith('.rotary_emb.inv_freq'):
      problems.append(f'{name} is extra')
  if problems:
    shown = '; '.join(sorted(problems)[:8])
    more = f'; and {len(problems) - 8} more' if len(problems) > 8 else ''
    raise ValueError(
      f'{folder}: its tensors are not those of {described.architecture} by '
      f'config.json: {shown}{more}'
    )


def check_tokenizer(file: Path, model: ModelConfig):
  """Checks that every token has an embedding.

  Raises:
    FileNotFoundError: there is no tokenizer.json.
    ValueError: it is none, or has more tokens than the vocabulary.
  """
  if not file.is_file():
    raise FileNotFoundError(
      f'{file} is missing; make it from another kind of tokenizer with '
      'transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained('
      'FOLDER)'
    )
  safetensors_file.check_fetched(file)
  ids = tokenizer_lib.load_tokenizer(file).get_vocab()
  name = max(ids, key=ids.__getitem__, default='')
  if ids.get(name, model.vocab_size) >= model.vocab_size:
    raise ValueError(
      f'{file}: its last token, {name!r}, has id {ids.get(name)}, and '
      f'config.json says vocab_size={model.vocab_size}; it is the tokenizer of '
      'another model, or tokens were added that have no embedding'
    )


def decide(
  files: TensorFiles, described: Description, wanted: Weights | None
) -> Weights:
  """What the blocks' matrices are to be read as.

  Args:
    files: whose tensors have been checked.
    described: what config.json says of them.
    wanted: what the user says; None: nothing.

  Raises:
    ValueError: tensors, config.json and user contradict each other.
  """
  found = described.weights
  there = names.tensors(described.model, described.architecture).values()
  linears = [tensor for tensor in there if tensor.linear]
  kinds = {files.tensors[x.theirs].dtype == 'U8' for x in linears}
  if len(kinds) > 1:
    raise ValueError(
      f'{files.path}: some matrices are of packed bytes (U8) and some of '
      'values; all of a model are quantised, or none'
    )
  if kinds == {True}:
    _check_factors(files, described, linears)
    found = 'ternary'
  elif found == 'ternary':
    raise ValueError(
      f'{files.path}: matrices are of values, and config.json says linear_'
      "class='bitlinear', for packed bytes (U8); set 'autobitlinear' if values "
      'times weight_scale are meant'
    )
  elif found is None and described.model.family == 'ternary':
    found = 'ternary'  # so it says of itself: what is not is refused
  elif found is None and wanted == 'float' and not described.weight_scale:
    found = 'float'  # whatever they look like
  elif found is None:
    found = _looks(files, described, linears, wanted)
  if wanted is None or wanted == found:
    return found
  # Any floats can be latents; where they are not ternary is said when they are
  # converted.
  if found == 'float':
    return wanted
  if found == 'ternary' and wanted == 'float' and not described.weight_scale:
    return 'float'
  hint = ''
  if (found, wanted) == ('ternary', 'latents'):
    hint = "; 'ternary' makes latents of exactly these values"
  raise ValueError(
    f'weights={wanted!r}, and those of {files.path} are {found!r}{hint}'
  )


def _check_factors(
  files: TensorFiles, described: Description, linears: list[names.Tensor]
):
  """Refuses scales that are the reciprocals of what config.json says.

  Raises:
    ValueError: they are, or one is not above 0 and finite.
  """
  middle = float(np.median([factor(files, described, x) for x in linears]))
  if middle > _LARGEST:
    there, other = 'bitlinear', 'autobitlinear'
    if described.weight_scale == 'factor':
      there, other = other, there
    raise ValueError(
      f'{files.path}: by linear_class={there!r} of quantization_config the '
      f'scales of its matrices are {middle:.3g} in the middle, and no trained '
      f'model has such; by {other!r} they are {1 / middle:.3g}: set that'
    )


def _looks(
  files: TensorFiles,
  described: Description,
  linears: list[names.Tensor],
  wanted: Weights | None,
) -> Weights:
  """By a few rows of every matrix that is not all zeros.

  Raises:
    ValueError: nobody says what matrices are, and they do not look alike, or
      like what the architecture is made of.
  """
  kinds = {}
  for tensor in linears:
    kind = _look(files, described, tensor)
    if kind is not None:
      kinds.setdefault(kind, tensor.theirs)
  found: Weights = 'ternary' if kinds.keys() == {'ternary'} else 'float'
  if wanted is not None:
    return found
  if len(kinds) > 1:
    raise ValueError(
      f'{files.where(kinds["ternary"])} is ternary, and '
      f'{files.where(kinds["float"])} is not: give weights (--weights float, '
      'or latents), or mend the matrices'
    )
  if (
    found == 'float'
    and described.architecture == 'BitNetForCausalLM'
    and described.weight_scale is None
    and not described.ours
  ):
    raise ValueError(
      f'{files.path}: matrices are not ternary, and config.json of '
      f'{described.architecture} has no quantization_config that would say '
      'that they are latents; give weights (--weights latents '
      '--activation-bits 8, or --weights float)'
    )
  return found


def _look(
  files: TensorFiles, described: Description, tensor: names.Tensor
) -> Literal['ternary', 'float'] | None:
  """What a matrix looks like; None: all zeros."""
  scales, axis = blocks(described.model, tensor)
  where = files.where(tensor.theirs)
  parts = scales if axis == 'out' else 1  # as many rows of each
  length = tensor.shape[0] // parts
  step = -(-length * parts // _ROWS)
  some_NK = files.rows(
    tensor.theirs,
    (p * length + n for p in range(parts) for n in range(0, length, step)),
  )
  if not np.any(some_NK):
    some_NK = files.read(tensor.theirs)
  if not np.any(some_NK):
    return None
  try:
    matrices.ternary_of(some_NK, scales, axis, where)
  except matrices.NotTernaryError:
    if _few(some_NK):
      # Trained floats have thousands; these are ternary ones that are damaged,
      # or in other blocks than config.json says.
      all_NK = files.read(tensor.theirs)
      if _few(all_NK):
        matrices.ternary_of(all_NK, scales, axis, where)
    return 'float'
  except ValueError:  # not finite: the place is in the whole
    matrices.check_finite(files.read(tensor.theirs), where)
    raise
  return 'ternary'


def _few(values: np.ndarray) -> bool:
  return len(np.unique(np.abs(values))) <= _FEW < values.size / 4


def blocks(model: ModelConfig, tensor: names.Tensor) -> tuple[int, ScaleAxis]:
  """How many scales a matrix has, and along which axis."""
  assert tensor.linear is not None
  return model.scale_blocks, model.linears[tensor.linear].scale_axis


def model_of(
  described: Description,
  kind: Weights,
  dtype: Dtype | None = None,
  activation_bits: Literal[8] | None = None,
) -> ModelConfig:
  """The model of the run to be made; None: as it is described.

  Raises:
    ValueError: a FloatLM is to round activations.
  """
  model = described.model
  if dtype is not None:
    model = dataclasses.replace(model, dtype=dtype)
  if activation_bits is not None:
    if kind == 'float':
      raise ValueError(
        f'activation_bits={activation_bits} is of ternary models, and weights '
        "are taken as float; give weights='latents' if these are a ternary "
        "model's"
      )
    model = dataclasses.replace(model, activation_bits=activation_bits)
  family = 'float' if kind == 'float' else 'ternary'
  if model.family == family:
    return model
  if family == 'float':
    return dataclasses.replace(
      model,
      family='float',
      scale_blocks=1,
      scale_floor=False,
      vocab_size=model.padded_vocab_size,
      vocab_multiple=1,
    )
  # Every released scale is within reach of a floor, not of a sum with eps;
  # and those who round activations have a floor in training, too.
  return dataclasses.replace(
    model,
    family='ternary',
    scale_floor=kind == 'ternary' or model.activation_bits is not None,
  )


def ternary(
  files: TensorFiles,
  described: Description,
  model: ModelConfig,
  tensor: names.Tensor,
) -> tuple[Int8[np.ndarray, 'N K'], Float32[np.ndarray, ' S']]:
  """Codes and scales of a matrix of codes or of ternary values.

  A block of zeros does not show its scale: it is said to be eps, as latents of
  zeros have.

  Raises:
    ValueError: it is of others: its place is named; or a scale is none.
  """
  scales, axis = blocks(model, tensor)
  stored_NK, where = files.read(tensor.theirs), files.where(tensor.theirs)
  if stored_NK.dtype == np.uint8:
    codes_NK = matrices.unpack(stored_NK, where)
    scale_S = np.ones(scales, np.float32)
  else:
    codes_NK, scale_S = matrices.ternary_of(stored_NK, scales, axis, where)
  scale_S = scale_S * factor(files, described, tensor)
  return codes_NK, pack.seen_scales(codes_NK, scale_S, axis)


def values(
  files: TensorFiles, described: Description, tensor: names.Tensor
) -> Float32[np.ndarray, 'N K']:
  """A matrix of latents, or of a FloatLM.

  Raises:
    ValueError: one is NaN or infinite, or a scale is none.
  """
  stored_NK = files.read(tensor.theirs)
  matrices.check_finite(stored_NK, files.where(tensor.theirs))
  return stored_NK.astype(np.float32) * factor(files, described, tensor)


def factor(
  files: TensorFiles, described: Description, tensor: names.Tensor
) -> np.float32:
  """What the tensor's values are to be multiplied by.

  Raises:
    ValueError: it is not above 0 and finite.
  """
  if described.weight_scale is None:
    return np.float32(1)
  name = f'{tensor.module}.weight_scale'
  scale = np.float32(files.read(name).reshape(())[()])
  with np.errstate(divide='ignore', over='ignore'):
    found = scale
    if described.weight_scale == 'divisor':
      found = np.float32(1) / scale
  if not 0 < found < np.inf or not 0 < scale < np.inf:
    raise ValueError(
      f'{files.where(name)} is {scale}; it must be above 0 and finite, and so '
      'its reciprocal'
    )
  return found
