# SPDX-License-Identifier: Apache-2.0
"""A run as a folder that `transformers` loads as it is.

It holds config.json, generation_config.json, safetensors, the tokenizer and a
model card. A model's matrices are written as what its forward pass multiplies
by, scale * codes, as TriLM's were published, or packed, as BitNet's: four codes
a byte, beside the scale. `huggingface` says which architecture computes which
model; others are refused.

What was written is read again, and its codes and scales are those of the run.
In float16 and bfloat16 scales are rounded: the codes are the same, the scales
and all other weights are not.

Shapes: K inputs, N outputs, S scale blocks.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8
import numpy as np

from tritera_jax.checkpoint import pack, restore, save
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop import (
  huggingface,
  matrices,
  model_card,
  names,
  safetensors_file,
  safetensors_writer,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.ternary import quantize
from tritera_kernels import fingerprint

Dtype = Literal['float32', 'float16', 'bfloat16']
Form = Literal['unpacked', 'packed']

_FORMS: dict[Form, huggingface.Form] = {
  'unpacked': 'values', 'packed': 'packed',
}  # fmt: skip
_STORED: dict[Dtype, safetensors_writer.Dtype] = {
  'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16',
}  # fmt: skip
_SHARD_BYTES = 4 * 10**9
_CODES_A_BYTE = 4


@dataclasses.dataclass(frozen=True)
class Report:
  """What `export` wrote.

  Attributes:
    folder: where.
    architecture: class of transformers that computes the model.
    step: of the checkpoint.
    dtype: of the float tensors.
    bytes: of all safetensors.
    fingerprint: of the run's codes and scales; None: it has no ternary ones.
    written: of those in the folder, whose scales are rounded to the dtype.
    rounding: most that a scale was rounded by, relative to it.
    notes: what the reader has to know, such as what is computed otherwise.
  """

  folder: Path
  architecture: str
  step: int
  dtype: Dtype
  bytes: int
  fingerprint: str | None
  written: str | None
  rounding: float
  notes: tuple[str, ...]

  def __str__(self) -> str:
    lines = [
      f'{self.folder}: {self.architecture} of step {self.step}, {self.dtype}, '
      f'{self.bytes:,} bytes'
    ]
    if self.fingerprint:
      lines.append(f'fingerprint {self.fingerprint}')
    return '\n'.join([*lines, *(f'note: {note}' for note in self.notes)])


def export(
  run: str | Path,
  out: str | Path,
  *,
  dtype: Dtype = 'float32',
  form: Form = 'unpacked',
  step: int | None = None,
  licence: str = 'unknown',
  shard_bytes: int = _SHARD_BYTES,
) -> Report:
  """Writes a run's checkpoint as a folder for transformers.

  Args:
    run: folder of the run.
    out: folder to make.
    dtype: of the tensors; float32 alone is exact.
    form: of the blocks' matrices: 'unpacked', scale * codes (of a FloatLM its
      weights); 'packed', codes of 2 bits, of models with one scale a matrix
      and int8 activations, which transformers rounds in this form.
    step: which checkpoint; default: the newest.
    licence: of the model, for its card, as the hub writes it: 'apache-2.0'.
    shard_bytes: most bytes of tensors in a file, unless it has only one.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    FileExistsError: `out` is there.
    ValueError: transformers computes no such model, or not in this form; the
      tokenizer is not the model's; weights that are not finite, or not in this
      dtype.
  """
  run, out = Path(run), Path(out)
  experiment = save.read_experiment(run)
  config = experiment.model
  tokenizer = tokenizer_lib.load_tokenizer(run / 'tokenizer.json')
  last = max(tokenizer.get_vocab().values(), default=-1)
  if last >= config.vocab_size:
    raise ValueError(
      f'{run}/tokenizer.json has ids up to {last}, and model.vocab_size='
      f'{config.vocab_size}: it is of another model'
    )
  end = tokenizer.token_to_id(tokenizer_lib.END_OF_TEXT)
  described = functools.partial(
    huggingface.config_json,
    config,
    _FORMS[form],
    dtype=dtype,
    end_of_text=end,
  )
  described()  # refuses before much is read
  with restore.committed(run, step) as (_, step):
    pass
  _, params = restore.restore_params(run, step)
  embed, head = params['embed']['embedding'], params['head']['kernel']
  tied = embed.shape == head.T.shape and bool(jnp.array_equal(embed, head.T))

  scales, proof = _survey(config, params, dtype)
  rounding = _rounding(scales, dtype)
  architecture = huggingface.architecture(config)
  with _whole(out) as folder:
    files = safetensors_writer.write(
      folder,
      list(_tensors(config, architecture, params, scales, dtype, form, tied)),
      shard_bytes=shard_bytes,
    )
    if proof is not None and (found := _written(config, folder)) != proof:
      raise AssertionError(f'{out} would hold {found}, wanted {proof}')
    _write_json(folder / 'config.json', described(tied=tied, fingerprint=proof))
    _write_tokenizer(run, folder, config, end)
    source = proof
    if proof is not None and dtype != 'float32':
      source = pack.latent_fingerprint(config, params)
    report = Report(
      out,
      architecture,
      step,
      dtype,
      sum(file.stat().st_size for file in files),
      source,
      proof,
      rounding,
      _notes(config, dtype, rounding),
    )
    card = model_card.text(
      run,
      experiment,
      step,
      architecture=architecture,
      licence=licence,
      dtype=dtype,
      form=form,
      fingerprint=source,
      notes=report.notes,
      name=out.name,
    )
    (folder / 'README.md').write_text(card)
  return report


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
  """A folder beside `out` that becomes it at the end of the block."""
  if out.exists():
    raise FileExistsError(f'{out} is there already; name a folder to be made')
  partial = out.with_name(f'{out.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)  # of one that was interrupted
  partial.mkdir(parents=True)
  try:
    yield partial
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
  partial.rename(out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantized(config: ModelConfig, linear: str, w_KN):
  quantizer = quantize.quantizer(config.family, floor=config.scale_floor)
  axis = config.linears[linear].scale_axis
  codes_KN, scale_S = quantizer(w_KN, config.scale_blocks, axis)
  return codes_KN.T, scale_S


def _leaf(params: Params, tensor: names.Tensor) -> Float32[Array, '...']:
  leaf: Any = params
  for part in tensor.path:
    leaf = leaf[part]
  return leaf if tensor.layer is None else leaf[tensor.layer]


def _rounded(scale_S: np.ndarray, dtype: Dtype) -> Float32[np.ndarray, ' S']:
  return scale_S.astype(jnp.dtype(dtype)).astype(np.float32)


def _survey(
  config: ModelConfig, params: Params, dtype: Dtype
) -> tuple[dict[str, Float32[np.ndarray, ' S']], str | None]:
  """The scales of every matrix, and the fingerprint that a reader will find.

  Of a block of zeros no reader finds the scale: it is said to be eps.
  """
  if config.family == 'float':
    return {}, None
  scales = {}

  def each():
    for tensor in names.tensors(config, '').values():
      if tensor.linear is None:
        continue
      codes_NK, scale_S = map(
        np.asarray, _quantized(config, tensor.linear, _leaf(params, tensor))
      )
      if not np.isfinite(scale_S).all():
        raise ValueError(
          f'{tensor.name} has scale {scale_S}: its latents are not finite'
        )
      scales[tensor.name] = scale_S
      axis = config.linears[tensor.linear].scale_axis
      rounded_S = _rounded(scale_S, dtype)
      if not rounded_S.all() or not np.isfinite(rounded_S).all():
        raise ValueError(
          f'{tensor.name} has scale {scale_S}, which {dtype} cannot hold; '
          "give dtype='float32'"
        )
      yield tensor.name, codes_NK, _seen(codes_NK, rounded_S, axis), axis

  proof = fingerprint.trit_fingerprint(each())
  return scales, proof if config.family == 'ternary' else None


def _blocks(matrix_NK: np.ndarray, blocks: int, axis: str) -> list[np.ndarray]:
  return np.split(matrix_NK, blocks, 0 if axis == 'out' else 1)


def _seen(codes_NK, scale_S, axis: str) -> Float32[np.ndarray, ' S']:
  some_S = [block.any() for block in _blocks(codes_NK, len(scale_S), axis)]
  return np.where(some_S, scale_S, np.float32(quantize.EPS))


def _rounding(scales: dict[str, np.ndarray], dtype: Dtype) -> float:
  return max(
    (
      float(np.max(np.abs(_rounded(scale_S, dtype) / scale_S - 1)))
      for scale_S in scales.values()
    ),
    default=0.0,
  )


def _tensors(
  config: ModelConfig,
  architecture: str,
  params: Params,
  scales: dict[str, np.ndarray],
  dtype: Dtype,
  form: Form,
  tied: bool,
) -> Iterator[safetensors_writer.Tensor]:
  """All that is written, in the order of the forward pass."""
  stored = functools.partial(_stored, dtype=dtype)
  for tensor in names.tensors(config, architecture).values():
    if tied and tensor.name == 'head':
      continue
    if tensor.linear is None:
      make: Callable[[], np.ndarray] = functools.partial(
        stored, tensor, functools.partial(_plain, params, tensor)
      )
    elif form == 'packed':
      make = functools.partial(_packed, config, params, tensor)
      N, K = tensor.shape
      yield safetensors_writer.Tensor(
        tensor.theirs, 'U8', (N // _CODES_A_BYTE, K), make
      )
      scale = scales[tensor.name]
      yield _factor(tensor, dtype, scale)
      continue
    else:
      make = functools.partial(
        stored, tensor, functools.partial(_values, config, params, tensor)
      )
      if config.activation_bits is not None:
        yield _factor(tensor, dtype, np.ones(1, np.float32))
    yield safetensors_writer.Tensor(
      tensor.theirs, _STORED[dtype], tensor.shape, make
    )


def _factor(tensor: names.Tensor, dtype: Dtype, scale) -> Any:
  return safetensors_writer.Tensor(
    f'{tensor.module}.weight_scale',
    _STORED[dtype],
    (1,),
    lambda: scale.astype(jnp.dtype(dtype)),
  )


def _stored(tensor: names.Tensor, make, *, dtype: Dtype) -> np.ndarray:
  """What `make` makes, in the dtype of the file."""
  wide = make()
  with np.errstate(over='ignore'):  # it is looked at next
    array = wide.astype(jnp.dtype(dtype))
  if not np.isfinite(array).all():
    peak = np.max(np.abs(wide))
    raise ValueError(
      f'{tensor.name} has a weight of {peak}, which {dtype} cannot hold'
      + ("; give dtype='bfloat16'" if np.isfinite(peak) else '')
    )
  return array


def _plain(params: Params, tensor: names.Tensor) -> np.ndarray:
  array = np.asarray(_leaf(params, tensor))
  return array.T if tensor.transposed else array


def _values(
  config: ModelConfig, params: Params, tensor: names.Tensor
) -> Float32[np.ndarray, 'N K']:
  """What the forward pass multiplies by."""
  if config.family == 'float':
    return _plain(params, tensor)
  assert tensor.linear is not None
  leaf = _leaf(params, tensor)
  codes_NK, scale_S = map(np.asarray, _quantized(config, tensor.linear, leaf))
  axis = config.linears[tensor.linear].scale_axis
  values_NK = codes_NK.astype(np.float32)
  for block_nk, scale in zip(
    _blocks(values_NK, len(scale_S), axis), scale_S, strict=True
  ):
    block_nk *= scale
  return values_NK


def _packed(
  config: ModelConfig, params: Params, tensor: names.Tensor
) -> UInt8[np.ndarray, 'n K']:
  """Byte row r holds rows r + i N / 4 at bits 2 i, as code + 1."""
  assert tensor.linear is not None
  codes_NK, _ = _quantized(config, tensor.linear, _leaf(params, tensor))
  digits_NK = (np.asarray(codes_NK) + 1).astype(np.uint8)
  packed_nK = np.zeros_like(digits_NK[: len(digits_NK) // _CODES_A_BYTE])
  for i, rows_nK in enumerate(np.split(digits_NK, _CODES_A_BYTE)):
    packed_nK |= rows_nK << (2 * i)
  return packed_nK


def _written(config: ModelConfig, folder: Path) -> str:
  """The fingerprint of what lies in the folder, from its bytes alone."""
  with safetensors_file.TensorFiles(folder) as files:

    def read():
      architecture = huggingface.architecture(config)
      for tensor in names.tensors(config, architecture).values():
        if tensor.linear is None:
          continue
        axis = config.linears[tensor.linear].scale_axis
        found = files.read(tensor.theirs)
        if found.dtype == np.uint8:
          codes_NK = matrices.unpack(found, tensor.theirs)
          scale_S = files.read(f'{tensor.module}.weight_scale')
        else:
          codes_NK, scale_S = matrices.ternary_of(
            found, config.scale_blocks, axis, tensor.theirs
          )
        scale_S = scale_S.astype(np.float32)
        yield tensor.name, codes_NK, _seen(codes_NK, scale_S, axis), axis

    return fingerprint.trit_fingerprint(read())


def _notes(
  config: ModelConfig, dtype: Dtype, rounding: float
) -> tuple[str, ...]:
  notes = []
  if dtype != 'float32':
    notes.append(
      f'weights are rounded to {dtype}'
      + (f', scales by up to {rounding:.1e} of them' if rounding else '')
      + '; dtype float32 is exact'
    )
  if config.activation_bits is not None:
    notes.append('transformers needs the package accelerate to load it')
  if config.document_separator is not None:
    notes.append(
      'in training, attention did not cross documents, which are parted by '
      f'token {config.document_separator}; here it does: give one document at '
      'a time'
    )
  if config.dtype != 'float32':
    notes.append(
      f'it was trained to compute in {config.dtype}, from float32 weights'
    )
  return tuple(notes)


def _write_json(file: Path, content: dict):
  file.write_text(json.dumps(content, indent=2) + '\n')


def _write_tokenizer(
  run: Path, folder: Path, config: ModelConfig, end: int | None
):
  shutil.copyfile(run / 'tokenizer.json', folder / 'tokenizer.json')
  ends = {}
  if end is not None:
    ends = dict.fromkeys(('bos_token', 'eos_token'), tokenizer_lib.END_OF_TEXT)
    _write_json(
      folder / 'generation_config.json',
      {'bos_token_id': end, 'eos_token_id': end, 'do_sample': False},
    )
  _write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_max_length': config.context_length,
      'clean_up_tokenization_spaces': False,
      **ends,
    },
  )
