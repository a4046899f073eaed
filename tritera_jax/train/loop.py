# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from pathlib import Path
import shutil
import time

import jax
import numpy as np
import tqdm

from tritera_jax.checkpoint import restore, save
from tritera_jax.data import loader, shards
from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.train import loss, metrics, step


def train(experiment: Experiment, *, quiet: bool = False) -> step.TrainState:
  """Trains to run.steps, from the newest checkpoint if there is one.

  Args:
    experiment: what to train, on what, how, and where to write it.
    quiet: without a progress bar.

  Returns:
    The final state, which is also the last checkpoint.

  Raises:
    ValueError: the dataset or the run folder does not fit the experiment.
    FloatingPointError: loss or gradient is not finite; the checkpoints before
      stand.
  """
  data, run = experiment.data, experiment.run
  folder = Path(run.folder)
  source = shards.open_split(data.path, 'train')
  _check_vocabulary(experiment, source)
  save.write_experiment(experiment, folder)
  shutil.copy(Path(data.path) / 'tokenizer.json', folder)

  mesh = mesh_lib.make_mesh(experiment.mesh)
  with jax.set_mesh(mesh), save.manager(folder, run.keep) as checkpoints:
    state = _restore_or_init(experiment, mesh, checkpoints)
    start = int(state.step)
    observe = _Observer(experiment, start, quiet)
    update = step.jitted(experiment, mesh)
    batches = loader.batches(
      [source],
      batch_size=data.batch_size,
      sequence_length=data.sequence_length,
      seed=data.seed,
    )
    with observe.bar:
      for n, batch in enumerate(loader.iterate(batches, start), start + 1):
        if n > run.steps:
          break
        observe.before_update(n, state)
        state, measured = update(state, batch['tokens'])
        observe.after_update(n, state, measured)
        if n % run.save_every == 0 or n == run.steps:
          save.save(checkpoints, n, params=state.params, rest=_rest(state))
    checkpoints.wait_until_finished()
  return state


def _rest(state: step.TrainState):
  return {'step': state.step, 'opt_state': state.opt_state}


def _restore_or_init(experiment, mesh, checkpoints) -> step.TrainState:
  newest = checkpoints.latest_step()
  if newest is None:
    return step.jitted_init(experiment, mesh)()
  target = step.abstract_state(experiment, mesh)
  items = restore.restore(
    checkpoints, newest, params=target.params, rest=_rest(target)
  )
  return step.TrainState(params=items['params'], **items['rest'])


def _check_vocabulary(experiment: Experiment, source: shards.TokenSource):
  if source.vocab_size != experiment.model.vocab_size:
    raise ValueError(
      f'model.vocab_size={experiment.model.vocab_size}, but the tokenizer of '
      f'{experiment.data.path} has {source.vocab_size} tokens; set '
      f'--model.vocab-size {source.vocab_size}'
    )


class _Observer:
  """What a run tells of itself: the progress bar and metrics.jsonl."""

  def __init__(self, experiment: Experiment, start: int, quiet: bool):
    run, data = experiment.run, experiment.data
    self.experiment = experiment
    self.file = metrics.MetricsFile(Path(run.folder), start)
    self.bar = tqdm.tqdm(
      total=run.steps, initial=start, unit='step', disable=quiet,
      mininterval=1, smoothing=0.05,
    )  # fmt: skip
    self.last, self.clock, self.compiling = start, 0.0, True
    self.codes_before = None
    self.held_out = None
    if run.evaluate_every:
      source = shards.open_split(data.path, 'validation')
      T = data.sequence_length
      self.held_out = loader.windows(source, T, T, run.evaluate_tokens)

  def before_update(self, n: int, state: step.TrainState):
    model, run = self.experiment.model, self.experiment.run
    if model.family == 'ternary' and n % run.telemetry_every == 0:
      self.codes_before = metrics.codes(model, state.params)

  def after_update(self, n: int, state: step.TrainState, measured):
    self.bar.update()
    experiment, run = self.experiment, self.experiment.run
    if self.compiling:
      jax.block_until_ready(measured)  # compiled by now: time from here
      self.last, self.clock, self.compiling = n, time.perf_counter(), False
    last = n == run.steps
    told = self.codes_before is not None
    evaluating = run.evaluate_every and (n % run.evaluate_every == 0 or last)
    # Before each save too: what is not finite must not be saved.
    logging = n % run.log_every == 0 or n % run.save_every == 0 or last
    if not (logging or told or evaluating):
      return
    record = {'step': n} | {k: float(v) for k, v in measured.items()}
    if n > self.last:
      seconds = time.perf_counter() - self.clock
      tokens = (n - self.last) * experiment.batch_tokens
      record['tokens_per_second'] = tokens / seconds
    if told:
      record |= metrics.telemetry(
        experiment.model, state.params, self.codes_before
      )
      self.codes_before = None
    if evaluating:
      record['held_out_loss'] = self.held_out_loss(state)
    self.file.write(record)
    self.bar.set_postfix_str(metrics.line(record), refresh=False)
    self.last, self.clock = n, time.perf_counter()
    for field in ('loss', 'gradient_norm'):
      if not np.isfinite(record[field]):
        raise FloatingPointError(
          f'{field} is {record[field]} at step {n}; {run.folder} keeps the '
          'checkpoints before it'
        )

  def held_out_loss(self, state: step.TrainState) -> float:
    """Nats a token over the first run.evaluate_tokens of held-out text."""
    assert self.held_out is not None
    model = decoder.bind(self.experiment.model, state.params)
    nats = loss.total_loss(
      model, self.held_out, self.experiment.data.batch_size
    )
    return nats / float(self.held_out[2].sum())
