# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself while it trains."""

import contextlib
import dataclasses
import math
from pathlib import Path
import time
from typing import Any

import jax
import tqdm

from tritera_jax.data import loader, shards
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.train import loss, metrics, step, throughput, trackers
from tritera_jax.train.goodput import Ledger
from tritera_jax.train.signals import Signals


class Observer(contextlib.ExitStack):
  """Progress bar, metrics.jsonl, trackers, telemetry and profiles.

  Steps are counted from 1 here: step n is the n-th update. `before_update`
  and `after_update` go around each. Of many processes all compute and the
  first writes.
  """

  def __init__(
    self, experiment: Experiment, start: int, quiet: bool, ledger: Ledger
  ):
    super().__init__()
    self.ledger = ledger
    run, data = experiment.run, experiment.data
    self.experiment, self.folder = experiment, Path(run.folder)
    writes = jax.process_index() == 0
    self.file = metrics.MetricsFile(self.folder, start) if writes else None
    self.bar = self.enter_context(
      tqdm.tqdm(
        total=run.steps, initial=start, unit='step',
        disable=quiet or not writes, mininterval=1, smoothing=0.05,
      )
    )  # fmt: skip
    self.trackers = trackers.open_trackers(
      self.folder,
      start,
      tensorboard=run.tensorboard and writes,
      wandb=run.wandb if writes else '',
      experiment=dataclasses.asdict(experiment),
    )
    for tracker in self.trackers:
      self.callback(tracker.close)
    self.last, self.clock, self.compiling = start, 0.0, True
    self.waited = 0.0  # for data, up to the last record
    self._write_goodput()
    self.before = None  # codes and scales
    self.profile_until = 0
    self.held_out = None
    if run.evaluate_every:
      source = shards.open_split(data.path, 'validation')
      T = data.sequence_length
      self.held_out = loader.windows(source, T, T, run.evaluate_tokens)

  def wants(self, n: int) -> bool:
    """Whether a record is written after step n."""
    run = self.experiment.run
    return (
      n % run.log_every == 0 or self._tells(n) or self._evaluates(n)
    ) or n == run.steps

  def _tells(self, n: int) -> bool:
    ternary = self.experiment.model.family == 'ternary'
    return ternary and n % self.experiment.run.telemetry_every == 0

  def _evaluates(self, n: int) -> bool:
    run = self.experiment.run
    if not run.evaluate_every:
      return False
    return n % run.evaluate_every == 0 or n == run.steps

  def before_update(self, n: int, state: step.TrainState, signals: Signals):
    run = self.experiment.run
    if self._tells(n):
      self.before = metrics.codes_and_scales(
        self.experiment.model, state.params
      )
    if (n == run.profile_at or signals.profile) and not self.profile_until:
      signals.profile = False
      self.profile_until = n + run.profile_steps
      folder = self.folder / 'profile'
      if jax.process_count() > 1:  # the traces of one host overwrite each other
        folder /= f'process_{jax.process_index()}'
      jax.profiler.start_trace(folder)
      self.callback(self._end_profile)

  def _end_profile(self):
    if self.profile_until:
      self.profile_until = 0
      jax.profiler.stop_trace()

  def after_update(self, n: int, state: step.TrainState, measured):
    self.ledger.step = n
    self.bar.update()
    experiment = self.experiment
    if self.compiling:
      jax.block_until_ready(measured)  # compiled by now: time from here
      self.last, self.clock, self.compiling = n, time.perf_counter(), False
    if self.profile_until and n + 1 >= self.profile_until:
      jax.block_until_ready(measured)
      self._end_profile()
    if not self.wants(n):
      return
    record: dict[str, Any] = {'step': n, 'tokens': n * experiment.batch_tokens}
    record |= {
      k: float(v) for k, v in measured.items() if k not in ('updated', 'votes')
    }
    record['perplexity'] = math.exp(min(record['loss'], 700))
    record['tokens_digest'] = f'{int(state.tokens_digest):08x}'
    waited = self.ledger.seconds.get('data', 0.0)
    if n > self.last:
      seconds = time.perf_counter() - self.clock
      record |= throughput.measures(experiment, n, n - self.last, seconds)
      record['data_share'] = (waited - self.waited) / seconds
    self.waited = waited
    if self._tells(n):
      record |= metrics.telemetry(experiment.model, state.params, self.before)
      self.before = None
    if self._evaluates(n):
      with self.ledger.phase('evaluate'):
        record['held_out_loss'] = self._held_out_loss(state)
    if self.file is not None:
      self.file.write(record)
    scalars = trackers.flat(record)
    for tracker in self.trackers:
      tracker.write(n, scalars)
    self.bar.set_postfix_str(metrics.line(record), refresh=False)
    self._write_goodput()
    self.last, self.clock = n, time.perf_counter()

  def _write_goodput(self):
    if self.file is not None:
      self.ledger.write(self.folder)

  def _held_out_loss(self, state: step.TrainState) -> float:
    """Nats a token over the first run.evaluate_tokens of held-out text."""
    assert self.held_out is not None
    model = decoder.bind(self.experiment.model, state.params)
    nats = loss.total_loss(
      model, self.held_out, self.experiment.data.batch_size
    )
    return nats / float(self.held_out[2].sum())
