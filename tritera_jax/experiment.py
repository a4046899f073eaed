# SPDX-License-Identifier: Apache-2.0
"""An experiment: model, data, optimizer and run, as frozen dataclasses.

An experiment file is Python with `experiment()`, or `sweep()` that maps names
to experiments. The command line changes numbers; a file changes classes. The
resolved experiment is written as JSON beside every checkpoint.
"""

import dataclasses
import fractions
import json
import math
from typing import Literal

import pydantic

from tritera_jax import validated
from tritera_jax.model.attention import Kernel
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Remat
from tritera_jax.parallel.gather import Gather
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.ternary.schedule import InfiniteSchedule, Schedule


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where tokens come from and how batches are cut.

  Attributes:
    path: dataset folder made by `tritera prepare`, or a bucket URL.
    batch_size: sequences a step, over all hosts, B.
    sequence_length: tokens a sequence, T.
    seed: of the order of windows.
    mixture: path and weight of each dataset to train on, instead of `path`
      alone; windows are drawn by weight. Tokenizer and held-out text are
      those of `path`. A dataset that is used up is read again in another
      order.
    reweighted: (n, weights): from batch n on (that of update n, counted from 0,
      where none is skipped), the datasets of `mixture` have these weights, in
      its order. Each goes on from where it is. A run that is resumed takes
      what begins at its newest checkpoint or later; a dataset that joins is
      added to `mixture` with weight 0.
    max_epochs: refuse a run that would read a dataset more often; 0: any.
  """

  path: str
  batch_size: int
  sequence_length: int
  seed: int = 0
  mixture: tuple[tuple[str, float], ...] = ()
  reweighted: tuple[tuple[int, tuple[float, ...]], ...] = ()
  max_epochs: float = 0.0

  def __post_init__(self):
    for field in ('batch_size', 'sequence_length'):
      if getattr(self, field) < 1:
        raise ValueError(f'data.{field}={getattr(self, field)} must be >= 1')
    if not 0 <= self.seed < 2**64:
      raise ValueError(f'data.seed={self.seed} must lie in 0..2^64-1')
    self._check_weights()

  def _check_weights(self):
    paths = [path for path, _ in self.sources]
    rows = [('data.mixture', tuple(weight for _, weight in self.sources))]
    before = 0
    for step, weights in self.reweighted:
      rows.append((f'data.reweighted: step {step}', weights))
      if len(weights) != len(paths):
        raise ValueError(
          f'data.reweighted: step {step} has {len(weights)} weights, '
          f'data.mixture {len(self.mixture)} datasets; give one for each'
        )
      if step <= before:
        raise ValueError(
          f'data.reweighted: step {step} comes after {before}; steps must '
          'grow, from 1 on (those of step 0 stand in data.mixture)'
        )
      before = step
    for where, weights in rows:
      for path, weight in zip(paths, weights, strict=True):
        if not 0 <= weight < float('inf'):
          raise ValueError(
            f'{where}: the weight of {path} is {weight}; it must be >= 0'
          )
      if not any(weights):
        raise ValueError(f'{where}: every weight is 0; give one that is not')
    for path, *weights in zip(paths, *(w for _, w in rows), strict=True):
      if not any(weights):
        raise ValueError(
          f'data.mixture: the weight of {path} is 0 and stays so; give it one '
          'there or in data.reweighted, or leave it out'
        )

  @property
  def sources(self) -> tuple[tuple[str, float], ...]:
    """Paths and weights of what is trained on."""
    return self.mixture or ((self.path, 1.0),)

  @property
  def schedule(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """First batch and shares of every stretch of batches, from 0 on.

    Shares are whole numbers without a common divisor, exactly in the ratio of
    the weights as they are written: 0.1 is a tenth. Neighbours differ.
    """
    stretches = []
    first = (0, tuple(weight for _, weight in self.sources))
    for step, weights in (first, *self.reweighted):
      exact = [fractions.Fraction(str(weight)) for weight in weights]
      scale = math.lcm(*(weight.denominator for weight in exact))
      whole = [int(weight * scale) for weight in exact]
      shares = tuple(share // math.gcd(*whole) for share in whole)
      if not stretches or stretches[-1][1] != shares:
        stretches.append((step, shares))
    return tuple(stretches)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
  """Muon (arXiv 2502.16982) for the blocks' matrices; AdamW keeps the rest.

  Attributes:
    rate: learning rate of these matrices, as a multiple of the schedule's.
    rms: root mean square of their updates before the learning rate: 0.2 is
      about AdamW's, so that its rates and weight decays serve. None: Jordan's
      factor, sqrt(max(1, N / K)) of an orthogonal [K, N], for rates of 0.02.
    beta: decay of the momentum, which is Nesterov's.
    iterations: of Newton-Schulz.
  """

  rate: float = 1.0
  rms: float | None = 0.2
  beta: float = 0.95
  iterations: int = 5

  def __post_init__(self):
    for field in ('rate', 'rms'):
      value = getattr(self, field)
      if value is not None and not 0 < value < float('inf'):
        raise ValueError(f'optimizer.muon.{field}={value} must be > 0')
    if not 0 <= self.beta < 1:
      raise ValueError(f'optimizer.muon.beta={self.beta} must lie in [0, 1)')
    if self.iterations < 1:
      raise ValueError(
        f'optimizer.muon.iterations={self.iterations} must be >= 1'
      )


@dataclasses.dataclass(frozen=True)
class DiLoCoConfig:
  """DiLoCo (arXiv 2311.08105), or with Muon MuLoCo (2505.23725).

  Attributes:
    workers: that train apart, each on its share of every batch; a multiple of
      mesh.data, along which they lie.
    every: steps between agreements, H; it divides run.steps.
    rate: of the outer step, eta.
    momentum: of the outer step, which is Nesterov's, mu.
    bits: that matrices' differences are sent in, 2 or 4, what rounding left
      out being added to the next; 32: they are not rounded.
  """

  workers: int
  every: int = 30
  rate: float = 0.7
  momentum: float = 0.6
  bits: Literal[2, 4, 32] = 32

  def __post_init__(self):
    for field in ('workers', 'every'):
      if getattr(self, field) < 1:
        raise ValueError(
          f'optimizer.diloco.{field}={getattr(self, field)} must be >= 1'
        )
    if not 0 < self.rate < float('inf'):
      raise ValueError(f'optimizer.diloco.rate={self.rate} must be > 0')
    if not 0 <= self.momentum < 1:
      raise ValueError(
        f'optimizer.diloco.momentum={self.momentum} must lie in [0, 1)'
      )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW under a schedule; betas are the paper's (Spectra A.3).

  Attributes:
    schedule: learning rate and weight decay by step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    epsilon: added to the root of the second moment.
    clip_norm: largest global gradient norm.
    z_loss: adds this times the mean of log(Z)^2 to the loss that is minimised,
      Z the sum of the exponentials of a token's logits (PaLM's 1e-4).
    muon: for the blocks' matrices in place of AdamW; None: AdamW for all.
    diloco: workers that train apart and agree now and then; None: every step.
  """

  schedule: Schedule
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0
  z_loss: float = 0.0
  muon: MuonConfig | None = None
  diloco: DiLoCoConfig | None = None

  def __post_init__(self):
    if not self.clip_norm > 0:
      raise ValueError(f'optimizer.clip_norm={self.clip_norm} must be > 0')
    if not self.z_loss >= 0:
      raise ValueError(f'optimizer.z_loss={self.z_loss} must be >= 0')


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
  """What is done about a batch whose loss or gradient went wrong.

  A loss or gradient that is not finite always is. To roll back is to restore a
  checkpoint of before the batch and never to train on it or those around it;
  `RUN/skipped.json` says which those were.

  Attributes:
    then: 'stop', or 'roll_back'.
    spike: a loss also is, so many nats above the mean of those before it;
      0: none.
    window: losses in that mean; until there are as many, none is a spike.
    before: batches before the wrong one that are skipped with it.
    after: batches after it that are.
    most: times that a run is rolled back before it stops after all.
  """

  then: Literal['stop', 'roll_back'] = 'stop'
  spike: float = 0.0
  window: int = 100
  before: int = 100
  after: int = 100
  most: int = 10

  def __post_init__(self):
    for field in ('spike', 'before', 'after', 'most'):
      value = getattr(self, field)
      if not 0 <= value < float('inf'):
        raise ValueError(f'run.recovery.{field}={value} must be >= 0')
    if self.window < 1:
      raise ValueError(f'run.recovery.window={self.window} must be >= 1')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How long, how often, and where.

  Attributes:
    folder: run folder: experiment.json, checkpoints/, metrics.jsonl, ...
    steps: updates in all.
    seed: of the initial parameters.
    start_from: run folder whose newest parameters are the initial ones, as
      latents of this run's weight family; '': random ones. Its optimizer,
      schedule and place in the data are not taken.
    log_every: steps between lines of metrics.
    telemetry_every: steps between ternary statistics.
    evaluate_every: steps between losses on held-out text; 0 is never.
    evaluate_tokens: tokens of held-out text, from its start, for those.
    save_every: steps between checkpoints; the last step is always saved.
    save_share: most of the time that training may wait for checkpoints: one
      that would exceed it, or come before the last is written, is put off. 1:
      none is. Those kept for good, of the last step and of a stop never are.
    keep: newest checkpoints kept.
    keep_every: also keep those of every so many steps; 0: none.
    keep_powers: also save and keep those of steps 1, 2, 4, 8, ...: what
      `tritera dynamics` compares.
    recovery: what is done about a batch whose loss went wrong.
    skip: ranges of batches, first and one past the last, never to train on.
    stall_seconds: longest that a step, a batch, a save, a compilation, an
      evaluation or the restoring of a checkpoint may take. After half of it
      what is waited for is named and every thread's stack printed; after all
      of it the process exits with 75.
    stop_seconds: from a signal to stop until the process exits with 75, saved
      or not; 0: it waits for the save.
    accumulation: parts that a batch is computed in, one after the other:
      less memory, the same update.
    remat: what the backward pass computes again, to save memory: 'none',
      'dots' (all but matmuls' results) or 'block' (everything).
    gather: how devices that share matrices (mesh.fsdp) make them whole: 'auto'
      as XLA decides, 'bfloat16', or 'two_bit': an eighth of its traffic, for
      packing and unpacking the codes in each pass. Results are the same.
    attention: 'xla', or 'cudnn' on NVIDIA GPUs in bfloat16, which never keeps
      T x T scores.
    loss_chunk: most tokens of a device whose logits exist at once in training;
      0: all of them, and XLA's own derivative.
    tensorboard: also write metrics for TensorBoard to FOLDER/tensorboard.
    wandb: project in Weights & Biases to report to; '' is none.
    profile_at: step at which to record a trace to FOLDER/profile; 0 is never.
      `kill -USR1` on a running process records one at once.
    profile_steps: steps in a trace.
    peak_tflops: of one device, in the compute dtype, for the MFU; 0: known
      for common GPUs and TPUs.
  """

  folder: str
  steps: int
  seed: int = 0
  start_from: str = ''
  log_every: int = 10
  telemetry_every: int = 100
  evaluate_every: int = 0
  evaluate_tokens: int = 65_536
  save_every: int = 1000
  save_share: float = 0.1
  keep: int = 2
  keep_every: int = 0
  keep_powers: bool = False
  recovery: RecoveryConfig = RecoveryConfig()
  skip: tuple[tuple[int, int], ...] = ()
  stall_seconds: float = 1800.0
  stop_seconds: float = 0.0
  accumulation: int = 1
  remat: Remat = 'none'
  gather: Gather = 'auto'
  attention: Kernel = 'xla'
  loss_chunk: int = 1024
  tensorboard: bool = True
  wandb: str = ''
  profile_at: int = 0
  profile_steps: int = 5
  peak_tflops: float = 0.0

  def __post_init__(self):
    for field in ('steps', 'log_every', 'telemetry_every', 'save_every',
                  'keep', 'accumulation', 'profile_steps'):  # fmt: skip
      if getattr(self, field) < 1:
        raise ValueError(f'run.{field}={getattr(self, field)} must be >= 1')
    if not 0 < self.save_share <= 1:
      raise ValueError(f'run.save_share={self.save_share} must lie in (0, 1]')
    if not self.stall_seconds > 0:
      raise ValueError(f'run.stall_seconds={self.stall_seconds} must be > 0')
    if not self.stop_seconds >= 0:
      raise ValueError(f'run.stop_seconds={self.stop_seconds} must be >= 0')
    for first, stop in self.skip:
      if not 0 <= first < stop:
        raise ValueError(
          f'run.skip: {first} {stop} is no range of batches; give its first '
          'and one past its last'
        )
    if self.steps >= 2**31:
      raise ValueError(
        f'run.steps={self.steps} must be < 2^31: the counter is an int32; '
        'raise data.batch_size'
      )
    if self.loss_chunk < 0:
      raise ValueError(
        f'run.loss_chunk={self.loss_chunk} must be >= 1, or 0 for no chunks'
      )

  def keeps(self, step: int) -> bool:
    """Whether the checkpoint of a step, from 1 on, is saved and kept."""
    if self.keep_powers and step & (step - 1) == 0:
      return True
    return bool(self.keep_every) and step % self.keep_every == 0


@dataclasses.dataclass(frozen=True)
class Experiment:
  """All that a run depends on but code, versions and machine."""

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig
  run: RunConfig
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.data.sequence_length > self.model.context_length:
      raise ValueError(
        f'data.sequence_length={self.data.sequence_length} exceeds '
        f'model.context_length={self.model.context_length}; raise the latter '
        'or shorten the sequences'
      )
    if self.data.batch_size % self.run.accumulation:
      raise ValueError(
        f'run.accumulation={self.run.accumulation} must divide '
        f'data.batch_size={self.data.batch_size}'
      )
    if self.run.attention == 'cudnn' and self.model.dtype != 'bfloat16':
      raise ValueError(
        f"run.attention='cudnn' takes bfloat16, and model.dtype="
        f"{self.model.dtype!r}; set model.dtype to 'bfloat16', or "
        "run.attention to 'xla'"
      )
    if self.model.family == 'float':
      if self.run.gather == 'two_bit':
        raise ValueError(
          "run.gather='two_bit' sends codes, and model.family='float' has "
          "none; set run.gather to 'bfloat16' or 'auto'"
        )
      if self.run.gather == 'bfloat16' and self.model.dtype != 'bfloat16':
        raise ValueError(
          "run.gather='bfloat16' would round the weights that model.dtype="
          f"{self.model.dtype!r} multiplies; set run.gather to 'auto', or "
          "model.dtype to 'bfloat16'"
        )
    diloco = self.optimizer.diloco
    if diloco is not None and self.run.steps % diloco.every:
      raise ValueError(
        f'optimizer.diloco.every={diloco.every} must divide run.steps='
        f'{self.run.steps}: the last step has to be an agreement'
      )
    if isinstance(self.optimizer.schedule, InfiniteSchedule):
      self.optimizer.schedule.check_fits(self.run.steps)

  @property
  def batch_tokens(self) -> int:
    """Training tokens a step."""
    return self.data.batch_size * self.data.sequence_length

  @property
  def tokens(self) -> int:
    """Training tokens of the whole run."""
    return self.run.steps * self.batch_tokens


_ADAPTER = pydantic.TypeAdapter(Experiment)


def to_json(experiment: Experiment) -> str:
  """The experiment as JSON, every field written out."""
  return json.dumps(dataclasses.asdict(experiment), indent=2)


def from_json(text: str, source: str = 'experiment.json') -> Experiment:
  """The experiment that `to_json` wrote.

  Raises:
    ValueError: not JSON, or a field is missing, unknown or of a wrong type:
      each by its dotted name.
  """
  return validated.from_json(_ADAPTER, text, source)
