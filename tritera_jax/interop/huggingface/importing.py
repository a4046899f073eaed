# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint to a run folder: to score, pack and train on.

A ternarised matrix becomes latents that round to exactly its codes and scales
(`ternary.latents`). The new run is written beside its place and renamed when
all of it is there, with experiment.json, without which nothing loads, last. Of
the parameters no more than a matrix and what is made of it lies in memory.
"""

from collections.abc import Iterator, Mapping
import json
from pathlib import Path
import shutil
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import PyTree
import numpy as np

from tritera_jax.checkpoint import save, staged
from tritera_jax.checkpoint.staged import StagedArray
from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.interop.huggingface import (
  contents,
  hub,
  kept,
  names,
  new_folder,
)
from tritera_jax.interop.huggingface import source as source_lib
from tritera_jax.interop.huggingface.contents import Dtype, Weights
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary import latents as latents_lib
from tritera_jax.ternary.schedule import CosineSchedule
from tritera_kernels import fingerprint

RECORD = 'imported.json'


class Report(NamedTuple):
  """What `import_run` wrote.

  Attributes:
    folder: the run's.
    architecture: the source's.
    weights: what its matrices were read as.
    fingerprint: of the run's codes and scales; None: a FloatLM has none.
    rounded: matrices whose scale no latents have to the bit.
    ulps: the most that one is off, in units of a float32's last place.
  """

  folder: Path
  architecture: str
  weights: Weights
  fingerprint: str | None
  rounded: int
  ulps: int


def import_run(
  source: str | Path,
  out: str | Path,
  *,
  weights: Weights | None = None,
  dtype: Dtype | None = None,
  activation_bits: Literal[8] | None = None,
  progress=iter,
) -> Report:
  """Writes a new run folder from a folder of config.json and safetensors.

  Args:
    source: the folder, or hf://owner/name or hf://owner/name@revision.
    out: folder to make.
    weights: what the blocks' matrices hold: 'ternary' values or codes,
      'latents' of a ternary model, or a FloatLM's ('float'). Default: as
      config.json says, or else as all matrices look; demanding one that the
      file contradicts is refused. Latents can be any floats.
    dtype: compute dtype of the run's model; default: float32, or what it was
      before it was exported from here.
    activation_bits: 8: matrices take int8 activations and their scales have
      BitNet's floor, which latents without a quantization_config do not say
      of themselves (those of Falcon-E's revision `prequantized`).
    progress: wraps the iterable of tensors, as tqdm does.

  Raises:
    FileNotFoundError: a file is missing.
    FileExistsError: `out` is there.
    ValueError: the checkpoint is damaged, contradicts itself, or is of a model
      that ours cannot be: file, tensor or field, value and fix.
  """
  out = Path(out)
  new_folder.check(out)
  with source_lib.opened(
    hub.local(str(source)),
    weights=weights,
    dtype=dtype,
    activation_bits=activation_bits,
  ) as found:
    found.check_tokenizer()
    with new_folder.whole(out) as partial:
      _check_space(partial, found.model)
      (partial / 'staged').mkdir()
      work = _Work(found, partial / 'staged')
      proof = work.fill(progress(found.tensors))
      found.check_fingerprint(found.fingerprint() if work.rounded else proof)
      report = Report(
        out,
        found.described.architecture,
        found.weights,
        proof,
        work.rounded,
        work.ulps,
      )
      _write(partial, found, work.params, report, str(source))
  return report


def _check_space(folder: Path, model: ModelConfig):
  """Parameters are staged, and then written as a checkpoint."""
  leaves = jax.tree.leaves(decoder.abstract_params(model))
  needed = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise ValueError(
      f'{folder} takes up to {needed / 1e9:.1f} GB while it is made, and '
      f'{free / 1e9:.1f} GB are free there'
    )


class _Work:
  """Fills staged parameters, tensor by tensor.

  Attributes:
    params: as of `decoder.Params`.
    rounded, ulps: as of `Report`.
  """

  def __init__(self, found: source_lib.Source, folder: Path):
    self.found = found
    self.params = staged.empty(decoder.abstract_params(found.model), folder)
    self.rounded = self.ulps = 0

  def fill(self, tensors) -> str | None:
    """Fills all; the fingerprint of codes and scales."""
    found = self._each(tensors)
    if self.found.weights != 'float':
      return fingerprint.trit_fingerprint(found)
    for _ in found:
      pass
    return None

  def _each(self, tensors) -> Iterator[tuple]:
    """(name, codes [N, K], scale, axis) of the matrices, as they are put."""
    for tensor in tensors:
      if tensor.linear is not None:
        yield from self._put_matrix(tensor)
      else:
        values = self.found.rest(tensor)
        self._target(tensor)[...] = values.T if tensor.transposed else values

  def _target(self, tensor: names.Tensor) -> np.ndarray:
    leaf = self.params
    for part in tensor.path:
      leaf = leaf[part]
    return leaf if tensor.layer is None else leaf[tensor.layer]

  def _put_matrix(self, tensor: names.Tensor) -> Iterator[tuple]:
    model, weights = self.found.model, self.found.weights
    blocks, axis = contents.blocks(model, tensor)
    floor, wanted_S = model.scale_floor, None
    if weights == 'ternary':
      _, codes_NK, wanted_S, _ = self.found.matrix(tensor)
      try:
        latents_KN = latents_lib.latents_of(
          codes_NK.T, wanted_S, axis, floor=floor, ulps=latents_lib.MOST_ULPS
        )
      except ValueError as error:
        raise ValueError(f'{self.found.where(tensor)}: {error}') from None
    else:
      latents_KN = self.found.values(tensor).T
    self._target(tensor)[...] = latents_KN
    if weights == 'float':
      return
    codes_KN, scale_S = latents_lib.ternarized(latents_KN, blocks, axis, floor)
    codes_NK, scale_S = np.asarray(codes_KN).T, np.asarray(scale_S)
    if wanted_S is not None:
      ulps = int(latents_lib.ulps_apart(scale_S, wanted_S).max())
      self.rounded += ulps > 0
      self.ulps = max(self.ulps, ulps)
    yield tensor.name, codes_NK, scale_S, axis


def _experiment(model: ModelConfig, out: Path) -> Experiment:
  """A description whose model is known, and nothing of how it was trained."""
  return Experiment(
    model,
    DataConfig(path='', batch_size=1, sequence_length=model.context_length),
    OptimizerConfig(CosineSchedule(peak=0.0, warmup_steps=0, weight_decay=0.0)),
    RunConfig(str(out), steps=1, tensorboard=False),
  )


def _write(
  partial: Path,
  found: source_lib.Source,
  params: PyTree[StagedArray],
  report: Report,
  source: str,
):
  experiment = _experiment(found.model, report.folder)
  with save.writing(partial, experiment.run) as checkpoints:
    save.save(checkpoints, 0, found.model, save.Weights(params))
  shutil.rmtree(partial / 'staged')
  shutil.copyfile(found.tokenizer, partial / 'tokenizer.json')
  kept.keep(found.folder, partial)
  record: Mapping[str, Any] = {
    'source': source,
    'architecture': report.architecture,
    'weights': report.weights,
    'fingerprint': report.fingerprint,
    'rounded': report.rounded,
    'ulps': report.ulps,
    'config': json.loads((found.folder / 'config.json').read_bytes()),
  }
  (partial / RECORD).write_text(json.dumps(record, indent=2) + '\n')
  save.write_experiment(experiment, partial)
