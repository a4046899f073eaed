# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint to a GGUF file that llama.cpp runs.

`layout` says what the file holds. The architecture is `llama`, or `qwen3`
for a model with qk_norm. Shapes: N outputs, K inputs, S scale blocks.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tritera_jax.checkpoint import restore
from tritera_jax.data import shards
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.gguf import (
  gguf_file,
  layout,
  tensor_plan,
  tokenizer_keys,
)
from tritera_jax.interop.gguf.ggml_blocks import BLOCK_TYPES
from tritera_jax.interop.gguf.tensor_plan import (
  FloatTypes,
  Matrix,
  Otherwise,
  Planned,
  Types,
)
from tritera_jax.model.config import ModelConfig
from tritera_kernels import fingerprint

_SAMPLE_TOKENS = 2**16

# llama.h, llama_ftype.
_FILE_TYPES = {'f32': 0, 'f16': 1, 'tq1_0': 36, 'tq2_0': 37, 'q2_0': 41}


@dataclasses.dataclass(frozen=True)
class ExportReport:
  """What was written; printed by the command line.

  Attributes:
    file: where.
    architecture: ggml's name for it.
    bytes: of the file.
    tensors: how many of each type.
    change: the largest share of itself by which a scale changed in float16.
    fingerprint: of codes and scales, '' of a FloatLM.
    remarks: what the reader of the file should know.
  """

  file: Path
  architecture: str
  bytes: int
  tensors: dict[str, int]
  change: float
  fingerprint: str
  remarks: tuple[str, ...]

  def __str__(self) -> str:
    kinds = ', '.join(f'{n} {kind}' for kind, n in self.tensors.items())
    lines = [f'{self.file}: {self.architecture}, {self.bytes:,} bytes, {kinds}']
    if self.fingerprint:
      lines.append(f'  {self.fingerprint}')
    if self.change:
      lines.append(
        '  scales are float16 in the blocks: rounded by up to '
        f'{100 * self.change:.3f} % (tritera.scales has them exactly)'
      )
    return '\n'.join([*lines, *(f'  {remark}' for remark in self.remarks)])


def export(
  run: str | Path,
  file: str | Path,
  *,
  types: Types,
  otherwise: Otherwise | None = None,
  embedding: FloatTypes = 'f16',
  head: FloatTypes = 'f16',
  step: int | None = None,
  pre: tokenizer_keys.Pre | None = None,
  sample: str | Path | None = None,
  end: str | None = None,
  name: str | None = None,
  licence: str | None = None,
) -> ExportReport:
  """Writes a run's checkpoint as a GGUF file, and proves it by reading it.

  Args:
    run: the run's folder.
    file: to write; it is there when all of it is.
    types: of the blocks' matrices. A FloatLM's are 'f16' or 'f32'.
    otherwise: of a matrix that `types` cannot hold; default: refuse it.
    embedding: type of the token embedding.
    head: type of the output matrix.
    step: default: the newest checkpoint.
    pre: llama.cpp's rule for cutting text, where none is the tokenizer's own.
    sample: a text file on which to try `pre`; default: held-out text of the
      run's dataset.
    end: the token that ends a document; default: as
      `data.tokenizer.end_of_text_id` finds it.
    name: of the model; default: the folder's.
    licence: of the model, such as 'apache-2.0'.

  Raises:
    FileNotFoundError: no such run or checkpoint.
    FileExistsError: `file` is there.
    ValueError: the package gguf is missing; or the model, its tokenizer or a
      matrix cannot be expressed: says what can be done. Nothing is written.
  """
  gguf = _gguf()
  run, file = Path(run), Path(file)
  if file.exists():
    raise FileExistsError(f'{file} is there already; name a file to be made')
  experiment, params = restore.restore_params(run, step)
  with restore.committed(run, step) as (_, found):
    step = found
  config = experiment.model
  architecture = check_expressible(config)
  tokenizer = tokenizer_lib.load_tokenizer(run / 'tokenizer.json')
  begin = _begin(tokenizer)
  words, rule, remarks = _tokenizer(
    config, tokenizer, run, pre, end, sample, experiment.data.path
  )
  if config.document_separator is not None:
    remarks.append(
      'this model does not attend across documents, llama.cpp does: give it '
      'one at a time'
    )
  matrices = tensor_plan.ternary_matrices(config, params)
  plan = tensor_plan.plan_tensors(
    config, params, matrices, types, otherwise, embedding, head
  )
  proof = ''
  if matrices:
    proof = fingerprint.trit_fingerprint(matrices.values())

  file.parent.mkdir(parents=True, exist_ok=True)
  partial = file.with_name(f'{file.name}.partial')
  writer = gguf.GGUFWriter(partial, architecture)
  try:
    _add_model(writer, config, types, name or run.resolve().name, licence)
    _add_tokenizer(writer, words, rule, begin)
    _add_ours(writer, config, step, proof, matrices)
    _write_tensors(writer, plan)
    writer.close()
    _prove(partial, plan, proof)
    os.replace(partial, file)
  except BaseException:
    writer.close()
    partial.unlink(missing_ok=True)
    raise
  kinds = [planned.type for planned in plan]
  return ExportReport(
    file,
    architecture,
    file.stat().st_size,
    {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
    max((planned.change for planned in plan), default=0.0),
    proof,
    tuple(remarks),
  )


def _gguf() -> Any:
  try:
    import gguf
  except ModuleNotFoundError:
    raise ValueError(
      'GGUF files are written by the package gguf: '
      "pip install 'tritera_jax[gguf]'"
    ) from None
  return gguf


def check_expressible(config: ModelConfig) -> str:
  """llama.cpp's architecture for a model.

  Raises:
    ValueError: none computes it. `bitnet` (src/models/bitnet.cpp of 38fcfa1)
      has the norms and, since lately, ReLU squared, but multiplies by the
      embedding in place of a head, and ggml rounds activations to int8 by runs
      of 32 or 256 where these models were trained with one scale a token.
  """
  for field, known, why in (
    ('input_norm', False, 'no architecture has norms inside its linear layers'),
    (
      'sub_norm', False,
      "only 'bitnet' has them, whose head is its embedding: this one has a "
      'head of its own',
    ),
    ('mlp_activation', 'silu', 'llama and qwen3 have silu'),
    (
      'activation_bits', None,
      'ggml rounds activations by runs of 32 or 256, not by tokens, as this '
      'model was trained',
    ),
  ):  # fmt: skip
    value = getattr(config, field)
    if value != known:
      raise ValueError(
        f'model.{field}={value!r} cannot be exported to GGUF: {why}; evaluate '
        'and generate here, or export to Hugging Face'
      )
  return 'qwen3' if config.qk_norm else 'llama'


def _tokenizer(
  config: ModelConfig,
  tokenizer: Any,
  run: Path,
  pre: tokenizer_keys.Pre | None,
  end: str | None,
  sample: str | Path | None,
  data: str,
) -> tuple[tokenizer_keys.Vocabulary, str, list[str]]:
  """What the file says of tokens, its rule for text, and remarks."""
  if end is None:
    end_id = tokenizer_lib.end_of_text_id(tokenizer, run)
  else:
    end_id = tokenizer.token_to_id(end)
  if end_id is None:
    raise ValueError(
      f'end={end!r} is no token of the tokenizer; name the one that ends a '
      'document'
    )
  remarks = []
  if tokenizer.normalizer is not None:
    remarks.append(
      'its tokenizer normalises text first, llama.cpp does not: give it text '
      'in that form'
    )
  words = tokenizer_keys.vocabulary(tokenizer, config.padded_vocab_size, end_id)
  exact = tokenizer_keys.exact_rule(tokenizer)
  rules = ', '.join(tokenizer_keys.RULES)
  if pre is None and exact is None:
    raise ValueError(
      'llama.cpp has no rule that cuts text as this tokenizer does; name the '
      f'nearest with pre ({rules}), and the export says how many ids are the '
      'same; tokenizers of `tritera prepare --pieces llama-3` have a rule'
    )
  if pre is not None and pre not in tokenizer_keys.RULES:
    raise ValueError(f'pre={pre!r} is none of {rules}')
  if pre is None or pre == exact:
    assert exact is not None
    return words, exact, remarks
  text = _sample(sample, data)
  remark = f'pre={pre} is not how this tokenizer cuts text'
  if text is None:
    remarks.append(f'{remark}; by how much: name a text with sample')
  else:
    share = tokenizer_keys.agreement(tokenizer, pre, text)
    remarks.append(
      f'{remark}: {100 * share:.1f} % of the tokens of {len(text):,} '
      f'characters of {sample or data} are the same there'
    )
  return words, pre, remarks


def _sample(sample: str | Path | None, data: str) -> str | None:
  if sample is not None:
    try:
      return Path(sample).read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'sample={sample} is not UTF-8: {error}') from None
  try:
    source = shards.open_split(data, 'validation')
    tokenizer = shards.read_tokenizer(data)
  except (OSError, ValueError):
    return None
  ids = source.read(0, min(source.tokens, _SAMPLE_TOKENS))
  return tokenizer.decode(ids[ids != source.manifest.end_of_text].tolist())


def _add_model(
  writer: Any, config: ModelConfig, types: Types, name: str, licence: str | None
):
  writer.add_type('model')
  writer.add_name(name)
  if licence is not None:
    writer.add_license(licence)
  writer.add_file_type(_FILE_TYPES[types])
  writer.add_quantization_version(2)
  writer.add_vocab_size(config.padded_vocab_size)
  writer.add_context_length(config.context_length)
  writer.add_embedding_length(config.d_model)
  writer.add_block_count(config.layers)
  writer.add_feed_forward_length(config.d_ff)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_rope_freq_base(config.rope_theta)
  writer.add_layer_norm_rms_eps(config.norm_eps)


def _begin(tokenizer: Any) -> int | None:
  """The token that the tokenizer puts before every text, if it does."""
  empty, some = tokenizer.encode('').ids, tokenizer.encode('a').ids
  if not empty:
    return None
  if len(empty) > 1 or some[0] != empty[0]:
    raise ValueError(
      f'the tokenizer puts {tokenizer.encode("").tokens} around a text; '
      'llama.cpp can put one token before it: change post_processor in '
      'tokenizer.json'
    )
  return empty[0]


def _add_tokenizer(
  writer: Any,
  words: tokenizer_keys.Vocabulary,
  pre: str,
  begin: int | None,
):
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(words.tokens)
  writer.add_token_types(words.kinds)
  writer.add_token_merges(words.merges)
  # Without one of its own, a document is preceded by the end of another.
  writer.add_bos_token_id(words.end if begin is None else begin)
  writer.add_eos_token_id(words.end)
  writer.add_eot_token_id(words.end)
  writer.add_add_bos_token(begin is not None)
  writer.add_add_eos_token(False)


def _add_ours(
  writer: Any,
  config: ModelConfig,
  step: int,
  proof: str,
  matrices: dict[str, Matrix],
):
  writer.add_uint32('tritera.version', layout.VERSION)
  writer.add_string('tritera.model', json.dumps(dataclasses.asdict(config)))
  writer.add_uint32('tritera.step', step)
  if matrices:
    scales = np.concatenate([matrix.scale_S for matrix in matrices.values()])
    writer.add_string('tritera.fingerprint', proof)
    writer.add_array('tritera.scales', scales.tolist())


def _write_tensors(writer: Any, plan: list[Planned]):
  """One tensor in memory at a time."""
  for name, type, shape, *_ in plan:
    # An int8 array's shape is taken as it is, and a type's number too: the
    # package's own list of types ends before Q2_0.
    id = gguf_file.TYPE_IDS[type]
    _, width, size = gguf_file.TYPES[id]
    nbytes = int(np.prod(shape)) // width * size
    writer.add_tensor_info(name, shape, np.dtype(np.int8), nbytes, id)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for _, type, _, make, _ in plan:
    writer.write_tensor_data(_as_stored(make(), type))


def _as_stored(values: np.ndarray, type: str) -> np.ndarray:
  if type in BLOCK_TYPES:
    return values
  if type in ('f16', 'f32'):
    return np.ascontiguousarray(values, {'f16': '<f2', 'f32': '<f4'}[type])
  gguf = _gguf()
  kind = gguf.GGMLQuantizationType(gguf_file.TYPE_IDS[type])
  return gguf.quants.quantize(np.ascontiguousarray(values), kind)


def _prove(partial: Path, plan: list[Planned], proof: str):
  """Reads what was written.

  Raises:
    ValueError: it is not what was to be written (a defect of this program).
  """
  file = gguf_file.read(partial)
  there = {name: (t.type, t.shape) for name, t in file.tensors.items()}
  wanted = {name: (type, shape) for name, type, shape, *_ in plan}
  if there != wanted:
    raise ValueError(f'{partial} holds {there}, not {wanted}')
  found = ''
  if proof:
    found = fingerprint.trit_fingerprint(layout.read_matrices(file))
  if found != proof:
    raise ValueError(f'{partial} holds {found}, the latents are {proof}')
