# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint straight to a packed folder, to be run.

There are no latents between: scales are the source's, reciprocals too, and
beside the packed model no more than a matrix, embedding and head lie in memory.
"""

import dataclasses
from pathlib import Path

import numpy as np

from tritera_jax.checkpoint import pack
from tritera_jax.checkpoint.pack import PackReport
from tritera_jax.checkpoint.packed_file import Head
from tritera_jax.interop.huggingface import hub, kept, new_folder
from tritera_jax.interop.huggingface import source as source_lib
from tritera_kernels.matmul import Activations


def is_checkpoint(path: str, out: Path | None) -> bool:
  """Whether `pack_checkpoint` is meant, and not a run folder.

  With `out` it is where no run is, too: there it is told what is wanted.
  """
  if path.startswith(hub.SCHEME) or (Path(path) / 'config.json').is_file():
    return True
  return out is not None and not (Path(path) / 'experiment.json').is_file()


def pack_checkpoint(
  source: str | Path,
  out: str | Path,
  *,
  format: str,
  activations: Activations | None = None,
  head: Head | None = None,
  progress=iter,
) -> PackReport:
  """Writes a new packed folder from a folder of config.json and safetensors.

  Args:
    source: as of `importing.import_run`.
    out: folder to make.
    format: 'two_bit' or 'base_three'.
    activations: what the model is to be run with; default: what it was trained
      with.
    head: as of `pack.pack_model`.
    progress: wraps the iterable of matrices, as tqdm does.

  Raises:
    FileNotFoundError: a file is missing.
    FileExistsError: `out` is there.
    ValueError: the checkpoint is damaged, contradicts itself, is of a FloatLM,
      or of a model that packed ones cannot express.
  """
  out = Path(out)
  new_folder.check(out)
  with source_lib.opened(hub.local(str(source))) as found:
    model = found.model
    if model.family != 'ternary':
      raise ValueError(
        f'{found.folder} is of a FloatLM, which cannot be packed; if these '
        'are latents, `tritera import --weights latents` makes a run to pack'
      )
    found.check_tokenizer()
    packed = pack.pack_parts(
      model,
      map(found.matrix, progress(found.linears)),
      _rest(found),
      format=format,
      activations=activations,
      head=head,
    )
    found.check_fingerprint(packed.fingerprint)
    with new_folder.whole(out) as partial:
      report = pack.write(packed, partial, found.tokenizer)
      kept.keep_end(found.folder, partial)
  return dataclasses.replace(report, folder=out)


def _rest(found: source_lib.Source) -> dict[str, np.ndarray]:
  rest = {}
  for tensor in found.tensors:
    if tensor.linear is None:
      values = found.rest(tensor).astype(np.float32)
      rest[tensor.name] = values.T if tensor.transposed else values
  return rest
