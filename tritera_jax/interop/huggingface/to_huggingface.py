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

from collections.abc import Iterator
import dataclasses
import functools
import json
from pathlib import Path
import shutil
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt8
import numpy as np

from tritera_jax.checkpoint import pack, restore, save
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop import verify
from tritera_jax.interop.huggingface import (
  architectures,
  importing,
  kept,
  model_card,
  names,
  new_folder,
  safetensors_writer,
)
from tritera_jax.interop.huggingface.architectures import Form
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.ternary import quantize
from tritera_kernels import fingerprint

Dtype = Literal['float32', 'float16', 'bfloat16']

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
      weights); and of models with one scale a matrix and int8 activations,
      which transformers rounds: 'packed', codes of 2 bits, or 'latents', which
      it quantises in each forward pass, to be trained on.
    step: which checkpoint; default: the newest.
    licence: of the model, for its card, as the hub writes it: 'apache-2.0'.
    shard_bytes: most bytes of tensors in a file, unless it has only one.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    FileExistsError: `out` is there.
    ValueError: transformers computes no such model, or not in this form; the
      tokenizer is not the model's; weights that are not finite, or not in this
      dtype; latents that would be rounded.
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
  try:
    end = tokenizer_lib.end_of_text_id(tokenizer, run)
  except ValueError:
    end = None  # transformers can do without
  record = run / importing.RECORD
  source = json.loads(record.read_text())['config'] if record.is_file() else {}
  ids = kept.ids(source, end)
  described = functools.partial(
    architectures.config_json,
    config,
    form,
    dtype=dtype,
    end_of_text=end,
  )
  described()  # refuses before much is read
  with restore.committed(run, step) as (_, step):
    pass
  _, params = restore.restore_params(run, step)
  model = _Model(config, params, dtype, form)
  found = _survey(model)
  notes = _notes(config, dtype, found.rounding)
  with new_folder.whole(out) as folder:
    files = safetensors_writer.write(
      folder, list(_tensors(model, found)), shard_bytes=shard_bytes
    )
    _write_json(
      folder / 'config.json',
      described(tied=model.tied, fingerprint=found.written) | ids,
    )
    _prove(folder, found.written)
    _write_tokenizer(run, folder, config, ids)
    report = Report(
      out,
      architectures.architecture(config),
      step,
      dtype,
      sum(file.stat().st_size for file in files),
      found.fingerprint,
      found.written,
      found.rounding,
      notes,
    )
    card = model_card.text(
      run,
      experiment,
      step,
      name=out.name,
      architecture=report.architecture,
      licence=licence,
      dtype=dtype,
      form=form,
      fingerprint=found.fingerprint,
      written=found.written,
      notes=notes,
    )
    (folder / 'README.md').write_text(card)
  return report


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantized(config: ModelConfig, linear: str, w_KN):
  """Codes [N, K], scales [S], and the matrix [N, K] that they stand for."""
  quantizer = quantize.quantizer(config.family, floor=config.scale_floor)
  axis = config.linears[linear].scale_axis
  codes_KN, scale_S = quantizer(w_KN, config.scale_blocks, axis)
  return codes_KN.T, scale_S, quantize.dequantize(codes_KN, scale_S, axis).T


class _Model(NamedTuple):
  """Parameters, and what is made of each for the file."""

  config: ModelConfig
  params: Params
  dtype: Dtype
  form: Form

  @property
  def tied(self) -> bool:
    """Whether the head is the embedding, as that of an import can be."""
    embed, head = self.params['embed']['embedding'], self.params['head']
    return bool(jnp.array_equal(embed, head['kernel'].T))

  def tensors(self) -> list[names.Tensor]:
    architecture = architectures.architecture(self.config)
    return list(names.tensors(self.config, architecture).values())

  def leaf(self, tensor: names.Tensor) -> Float32[Array, '...']:
    leaf: Any = self.params
    for part in tensor.path:
      leaf = leaf[part]
    return leaf if tensor.layer is None else leaf[tensor.layer]

  def rounded(self, scale_S: np.ndarray) -> Float32[np.ndarray, ' S']:
    """As a reader finds them; of latents they are computed."""
    if self.form == 'latents':
      return scale_S
    return scale_S.astype(jnp.dtype(self.dtype)).astype(np.float32)

  def values(self, tensor: names.Tensor) -> np.ndarray:
    """Latents, or what a pass multiplies by or adds, in the file's dtype."""
    leaf = self.leaf(tensor)
    latents = tensor.linear is not None and self.form == 'latents'
    if (
      tensor.linear is not None
      and self.config.family != 'float'
      and not latents
    ):
      wide = np.asarray(_quantized(self.config, tensor.linear, leaf)[2])
    else:
      wide = np.asarray(leaf.T if tensor.transposed else leaf)
    with np.errstate(over='ignore'):  # it is looked at next
      array = wide.astype(jnp.dtype(self.dtype))
    if not np.isfinite(array).all():
      peak = np.max(np.abs(wide))
      raise ValueError(
        f'{tensor.name} has a weight of {peak}, which {self.dtype} cannot hold'
        + ("; give dtype='bfloat16'" if np.isfinite(peak) else '')
      )
    if latents and not np.array_equal(array, wide):
      raise ValueError(
        f'{tensor.name} has latents that {self.dtype} rounds, and so some to '
        "other codes; give dtype='float32'"
      )
    return array

  def packed(self, tensor: names.Tensor) -> UInt8[np.ndarray, 'n K']:
    """Byte row r holds rows r + i N / 4 at bits 2 i, as code + 1."""
    assert tensor.linear is not None
    codes_NK = _quantized(self.config, tensor.linear, self.leaf(tensor))[0]
    digits_NK = (np.asarray(codes_NK) + 1).astype(np.uint8)
    parts = np.split(digits_NK, _CODES_A_BYTE)
    packed_nK = parts[0].copy()
    for i, part_nK in enumerate(parts[1:], 1):
      packed_nK |= part_nK << (2 * i)
    return packed_nK


class _Survey(NamedTuple):
  """What has to be known before anything is written.

  Attributes:
    scales: of every matrix.
    fingerprint: of codes and scales; None: the model is not ternary.
    written: of those that a reader will find.
    rounding: most that a scale is rounded by, relative to it.
  """

  scales: dict[str, Float32[np.ndarray, ' S']]
  fingerprint: str | None
  written: str | None
  rounding: float


def _survey(model: _Model) -> _Survey:
  config = model.config
  if config.family == 'float':
    return _Survey({}, None, None, 0.0)
  scales, exact, rounding = {}, True, 0.0

  def each():
    nonlocal exact, rounding
    for name, codes_NK, scale_S, axis in pack.matrices(config, model.params):
      rounded_S = model.rounded(scale_S)
      if not np.array_equal(rounded_S > 0, scale_S > 0):
        raise ValueError(
          f'{name} has scale {scale_S}, which {model.dtype} takes for '
          "0; give dtype='float32'"
        )
      seen_S = pack.seen_scales(codes_NK, rounded_S, axis)
      exact = exact and np.array_equal(seen_S, scale_S)
      off_S = np.abs(rounded_S - scale_S) / np.maximum(scale_S, 1e-30)
      rounding = max(rounding, float(off_S.max()))
      scales[name] = scale_S
      yield name, codes_NK, seen_S, axis

  written = fingerprint.trit_fingerprint(each())
  if config.family != 'ternary':
    return _Survey(scales, None, None, rounding)
  own = written if exact else pack.latent_fingerprint(config, model.params)
  return _Survey(scales, own, written, rounding)


def _tensors(
  model: _Model, found: _Survey
) -> Iterator[safetensors_writer.Tensor]:
  """All that is written, in the order of the forward pass."""
  stored, tied = _STORED[model.dtype], model.tied

  def factor(tensor: names.Tensor, scale: np.ndarray):
    return safetensors_writer.Tensor(
      f'{tensor.module}.weight_scale', stored, (1,),
      lambda: scale.astype(jnp.dtype(model.dtype)),
    )  # fmt: skip

  for tensor in model.tensors():
    if tied and tensor.name == 'head':
      continue
    if tensor.linear is not None and model.form == 'packed':
      N, K = tensor.shape
      yield safetensors_writer.Tensor(
        tensor.theirs, 'U8', (N // _CODES_A_BYTE, K),
        functools.partial(model.packed, tensor),
      )  # fmt: skip
      yield factor(tensor, found.scales[tensor.name])
      continue
    yield safetensors_writer.Tensor(
      tensor.theirs, stored, tensor.shape,
      functools.partial(model.values, tensor),
    )  # fmt: skip
    if (
      tensor.linear is not None
      and model.config.activation_bits is not None
      and model.form != 'latents'
    ):
      yield factor(tensor, np.ones(1, np.float32))


def _prove(folder: Path, wanted: str | None):
  """Reads the matrices back.

  Raises:
    ValueError: other codes or scales are there than were to be written: a
      defect of this program, never of the run.
  """
  if wanted is None:
    return
  found = fingerprint.trit_fingerprint(verify.matrices(folder))
  if found != wanted:
    raise ValueError(f'{folder} holds {found}, wanted {wanted}')


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
  run: Path, folder: Path, config: ModelConfig, ids: dict[str, Any]
):
  """The tokenizer, and what an import brought along or else defaults."""
  shutil.copyfile(run / 'tokenizer.json', folder / 'tokenizer.json')
  tokenizer = tokenizer_lib.load_tokenizer(run / 'tokenizer.json')
  words = {}
  for name, id in ids.items():
    first = id[0] if isinstance(id, list) and id else id
    # -1 is no padding to some.
    if isinstance(first, int) and first >= 0:
      words[name.removesuffix('_id')] = tokenizer.id_to_token(first)
  if words:
    _write_json(folder / 'generation_config.json', {**ids, 'do_sample': False})
  _write_json(
    folder / 'tokenizer_config.json',
    {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'model_max_length': config.context_length,
      'clean_up_tokenization_spaces': False,
      **words,
    },
  )
  kept.give_back(run, folder)
