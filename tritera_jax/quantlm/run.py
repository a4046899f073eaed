# SPDX-License-Identifier: Apache-2.0
"""A FloatLM's run, quantised after training: Spectra's QuantLM.

The new run folder holds the values that codes stand for, as float parameters:
whatever takes a run scores it. Nothing is packed, the sizes are counted.
"""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Int32
import numpy as np

from tritera_jax.checkpoint import packed_file, restore, save
from tritera_jax.data import loader, shards
from tritera_jax.experiment import DataConfig
from tritera_jax.model import flops
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.quantlm import calibration, gptq, uniform
from tritera_jax.quantlm.uniform import Grid

RECORD = 'quantized.json'


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How a FloatLM's linear layers are quantised; the rest stays as it is.

  Defaults are those of Spectra's QuantLM (arXiv 2407.12327) of 3 and 4 bits;
  of 6 and 8 it has one group an output. The paper states no damping: GPTQ's.

  Attributes:
    bits: of a code, from 2 to 8.
    group: neighbouring inputs of an output that share a scale; None: all.
    symmetric: the same range on both sides of 0.
    method: 'gptq', or 'round_to_nearest', which takes no text.
    samples: windows of text that GPTQ sees, of data.sequence_length tokens.
    seed: of their choice.
    damping: of GPTQ's sums of x x^T, as a share of their mean diagonal.
  """

  bits: int
  group: int | None = 128
  symmetric: bool = True
  method: Literal['gptq', 'round_to_nearest'] = 'gptq'
  samples: int = 512
  seed: int = 0
  damping: float = 0.01

  @property
  def grid(self) -> Grid:
    """Values that a weight can take."""
    return Grid(self.bits, self.group, self.symmetric)

  def __post_init__(self):
    _ = self.grid  # which checks its own
    if self.samples < 1:
      raise ValueError(f'samples={self.samples} must be >= 1')
    if not 0 <= self.seed < 2**64:
      raise ValueError(f'seed={self.seed} must lie in 0..2^64-1')
    if not 0 <= self.damping < float('inf'):
      raise ValueError(f'damping={self.damping} must be >= 0')


class Report(NamedTuple):
  """What `quantize` wrote. Bits are as the papers count them."""

  folder: Path
  bits_per_weight: float
  size_bits: float


def quantize(
  run: str | Path,
  out: str | Path,
  how: Quantization,
  *,
  step: int | None = None,
  batch_size: int = 8,
  progress=iter,
) -> Report:
  """Writes a new run folder with quantised weights, and how in a record.

  Args:
    run: folder of a FloatLM's run. GPTQ's text comes from its training data.
    out: folder to make.
    how: values and method.
    step: which checkpoint; default: the newest.
    batch_size: windows of text at once.
    progress: wraps the iterable of blocks, as tqdm does.

  Raises:
    FileNotFoundError: no such run, checkpoint or data.
    FileExistsError: `out` is there.
    ValueError: not a FloatLM, its shape does not take the groups, or its
      weights or its inputs are unfit: see `uniform.fit` and `gptq.factor`.
  """
  run, out = Path(run), Path(out)
  experiment = save.read_experiment(run)
  _check(experiment.model, how.grid, run)
  if out.exists():
    raise FileExistsError(f'{out} is there already; name a folder to be made')
  _, params = restore.restore_params(run, step)
  batches = ()
  if how.method == 'gptq':
    batches = _text(experiment.data, how, batch_size)
  params = quantize_params(experiment.model, params, how, batches, progress)

  there = dataclasses.replace(experiment.run, folder=str(out))
  report = Report(
    out,
    how.grid.bits_per_weight,
    flops.size_bits(experiment.model, how.grid.bits_per_weight),
  )
  at = save.latest_step(run) if step is None else step
  assert at is not None  # it was restored
  save.write_experiment(dataclasses.replace(experiment, run=there), out)
  record = {
    'run': str(run),
    'step': at,
    'quantization': dataclasses.asdict(how),
    'calibration_tokens': sum(tokens_BT.size for tokens_BT in batches),
    'bits_per_weight': report.bits_per_weight,
    'size_bits': report.size_bits,
  }
  (out / RECORD).write_text(json.dumps(record, indent=2) + '\n')
  packed_file.copy_tokenizer(run / 'tokenizer.json', out)
  with save.writing(out, there) as checkpoints:
    save.save(checkpoints, at, experiment.model, save.Weights(params))
  return report


def quantize_params(
  config: ModelConfig,
  params: Params,
  how: Quantization,
  batches: Sequence[Int32[np.ndarray, '_ T']] = (),
  progress=iter,
) -> Params:
  """The values that quantised weights stand for, in the place of the weights.

  Args:
    config: of a FloatLM.
    params: its parameters.
    how: values and method.
    batches: GPTQ's text.
    progress: wraps the iterable of blocks, as tqdm does.

  Raises:
    ValueError: see `quantize`.
  """
  grid = how.grid
  if how.method == 'round_to_nearest':
    return calibration.each_matrix(
      config, params, lambda w: uniform.round_to_nearest(w, grid).dequantize()
    )

  def quantizer_for(sum_KK):
    factor_KK = gptq.factor(sum_KK, how.damping)
    return lambda w: gptq.gptq(w, factor_KK, grid).dequantize()

  return calibration.block_by_block(
    config, params, batches, quantizer_for, progress
  )


def _check(config: ModelConfig, grid: Grid, run: Path):
  if config.family != 'float':
    raise ValueError(
      f'model.family={config.family!r} of {run} is quantised as it is; name '
      "the run of a 'float' model, or `tritera pack` this one"
    )
  for name, spec in config.linears.items():
    try:
      grid.group_of(spec.in_features)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None


def _text(
  data: DataConfig, how: Quantization, batch_size: int
) -> list[Int32[np.ndarray, '_ T']]:
  """Windows of the training data, drawn by the weights of its first batch."""
  batch_size = min(batch_size, how.samples)
  found = loader.batches(
    [shards.open_split(path, 'train') for path, _ in data.sources],
    data.schedule,
    batch_size=batch_size,
    sequence_length=data.sequence_length,
    seed=how.seed,
  )
  full, left = divmod(how.samples, batch_size)
  rows = [batch_size] * full + [left] * bool(left)
  endless = loader.iterate(found, 0, prefetch=0)
  return [
    batch['tokens'][:count, :-1]
    for count, batch in zip(rows, endless, strict=False)
  ]
