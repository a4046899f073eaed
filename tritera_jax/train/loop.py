# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from collections.abc import Sequence
from pathlib import Path
import signal
import sys

import jax
import numpy as np
import tqdm

from tritera_jax.checkpoint import restore, save
from tritera_jax.data import loader, shards
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.experiment import Experiment
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel import processes, rules
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import goodput, recovery, step, watchdog
from tritera_jax.train import signals as signals_lib
from tritera_jax.train import start as start_lib
from tritera_jax.train.observer import Observer
from tritera_jax.train.signals import Stopped


def train(experiment: Experiment, *, quiet: bool = False) -> step.TrainState:
  """Trains to run.steps, from the newest sound checkpoint if there is one.

  SIGTERM and Ctrl-C save and stop between two steps; SIGUSR1 records a
  profile. Of many processes each calls this, after `processes.start`, with
  one run folder for all; the first writes what is not a checkpoint.

  Args:
    experiment: what to train, on what, how, and where to write it.
    quiet: without a progress bar.

  Returns:
    The final state, which is also the last checkpoint.

  Raises:
    ValueError: the dataset, the run folder or the mesh does not fit the
      experiment, or all its checkpoints are damaged.
    FloatingPointError: a loss or gradient went wrong and run.recovery is to
      stop; if it is not finite, the state before that step is saved.
    OSError: something could not be read; NotSavedError: or not be saved.
    Stopped: by a signal; the state is saved.
  """
  run, folder = experiment.run, Path(experiment.run.folder)
  ledger = goodput.Ledger(run.stall_seconds / 2)
  sources: Sequence[shards.TokenSource] = ()
  with (
    signals_lib.received() as signals,
    watchdog.watching(
      ledger,
      signals,
      lambda: loader.waiting(sources),
      stall_seconds=run.stall_seconds,
      stop_seconds=run.stop_seconds,
    ),
  ):
    sources = open_sources(experiment)
    tokenizer = shards.read_tokenizer(experiment.data.path)
    start_lib.check(experiment, tokenizer)
    mesh = mesh_lib.make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
      update = step.jitted(experiment, mesh, votes=jax.process_count() > 1)

      def open_folder():
        done = recovery.trained_below(folder)
        prints = [source.fingerprint for source in sources]
        save.write_experiment(experiment, folder, prints, done)
        tokenizer.save(str(folder / 'tokenizer.json'))
        end = sources[0].manifest.end_of_text
        tokenizer_lib.record_end(folder, tokenizer, end)
        recovery.record_named(folder, run.skip, done)

      processes.first_alone(open_folder)
      while True:
        attempt = _Attempt(experiment, mesh, sources, ledger, signals, quiet)
        try:
          return attempt.train(update)
        except recovery.BadBatch as bad:
          ledger.enter('recover')
          attempt.recover(bad)
          ledger.restart()


class _Attempt:
  """Training from the newest checkpoint to the end, or to a bad batch."""

  def __init__(self, experiment, mesh, sources, ledger, signals, quiet):
    self.experiment, self.mesh, self.ledger = experiment, mesh, ledger
    self.signals, self.quiet = signals, quiet
    data, run = experiment.data, experiment.run
    self.folder = Path(run.folder)
    self.placed = step.batch_sharding(mesh)
    self.whole = rules.shardings(mesh, ())
    self.rows = rules.rows_here(
      self.placed, (data.batch_size, data.sequence_length + 1)
    )
    self.batches = loader.batches(
      sources,
      data.schedule,
      batch_size=data.batch_size,
      sequence_length=data.sequence_length,
      seed=data.seed,
      rows=self.rows,
    )
    self.skipped = recovery.read_together(self.folder)
    self.pace = save.Pace(run.save_share)
    self.saved: int | None = None  # step of the newest checkpoint
    self.due = False  # a periodic checkpoint that is not made yet
    self.put_off = False  # one was, and it was said

  def train(self, update) -> step.TrainState:
    run, ledger = self.experiment.run, self.ledger
    ledger.enter('restore')
    state = self._restore_or_init()
    start = ledger.step = int(state.step)
    judge = recovery.Judge(run.recovery, self.folder, start)
    agreement = signals_lib.Agreement(self.mesh, self.signals)
    stream = recovery.stream(self.batches, start, self.skipped)
    now = None  # the last update's metrics, number and batch
    with (
      save.writing(
        self.folder, run, agreed=(Stopped, recovery.BadBatch)
      ) as self.checkpoints,
      Observer(self.experiment, start, self.quiet, ledger) as observer,
    ):
      for n in range(start, run.steps):
        ledger.enter('data')
        batch, rows = next(stream)
        tokens_BT1 = rules.assemble(
          self.placed, self.rows, rows['tokens'],
          self.experiment.data.batch_size,
        )  # fmt: skip
        ledger.enter('compile' if n == start else goodput.TRAINING)
        observer.before_update(n + 1, state, self.signals)
        writing = self.checkpoints.is_saving_in_progress()
        votes = agreement.votes(self.pace.busy(writing=writing))
        # Not device_put, which has all processes compare what they put.
        number = jax.make_array_from_callback(
          (), self.whole, lambda _, n=n: np.asarray(n, np.int32)
        )
        with jax.transfer_guard('disallow'):
          state, measured = update(state, tokens_BT1, number, *votes)
        before, now = now, (measured, n + 1, batch)
        # One step behind, so that the devices have work while we look.
        self._judge(judge, before, state)
        if observer.wants(n + 1):
          self._judge(judge, now, state)
        observer.after_update(n + 1, state, measured)
        wish = agreement.reached(before and before[0])
        if self._saves(n + 1, wish):
          self._judge(judge, now, state)
          self._save(state)
        if wish.stop:
          self._stop(wish.stop, n + 1)
      with ledger.phase('save'):
        save.wait(self.checkpoints)
    return state

  def _restore_or_init(self) -> step.TrainState:
    target = step.abstract_state(self.experiment, self.mesh)
    state = restore.restore_newest(
      self.folder, self.experiment.model, target, _say
    )
    self.saved = None if state is None else int(state.step)
    if state is None:
      given = start_lib.parameters(self.experiment, target.params)
      state = step.jitted_init(self.experiment, self.mesh)(*given)
    return state

  def _judge(self, judge: recovery.Judge, of, state: step.TrainState):
    """Raises BadBatch if an update's metrics are wrong."""
    if of is None:
      return
    measured, number, batch = of
    why = judge.why(measured, number)
    if why:
      # If it was not made the state is that before it, see `step.train_step`.
      waits = not measured['updated']
      raise recovery.BadBatch(number, batch, why, state if waits else None)

  def recover(self, bad: recovery.BadBatch):
    """Rolls back, or saves what may be saved.

    Raises:
      FloatingPointError: the run is to stop.
    """
    run = self.experiment.run
    config = run.recovery
    with save.writing(
      self.folder, run, agreed=(FloatingPointError,)
    ) as checkpoints:
      if config.then == 'roll_back':
        _say(recovery.roll_back(self.folder, checkpoints, config, bad))
        return
      words = 'the newest checkpoint is'
      if bad.state is not None:
        words = 'the state before it is saved as'
        if bad.step - 1 != self.saved:
          save.save(checkpoints, bad.step - 1, self.experiment.model, bad.state)
          save.wait(checkpoints)
      raise FloatingPointError(
        f'{bad}; {words} checkpoint {checkpoints.latest_step()} of '
        f'{self.folder}; to go on without its batch, {bad.batch}: '
        '--run.recovery.then roll_back'
      )

  def _saves(self, done: int, wish: signals_lib.Wish) -> bool:
    run = self.experiment.run
    self.due |= done % run.save_every == 0
    if wish.stop or done == run.steps or run.keeps(done):
      return True
    if self.due and wish.busy and not self.put_off:
      self.put_off = True
      _say(
        f'the checkpoint of step {done} is put off: the last one held training '
        f'up for {self.pace.blocked:.2f} s or is not written yet, see '
        'run.save_share; said once'
      )
    return self.due and not wish.busy

  def _save(self, state: step.TrainState):
    """Under the step of the state, unless it is there."""
    self.due = False
    done = int(state.step)
    if done != self.saved:
      self.saved = done
      with self.ledger.phase('save'), self.pace.saving():
        save.save(self.checkpoints, done, self.experiment.model, state)

  def _stop(self, number: int, done: int):
    with self.ledger.phase('save'):
      save.wait(self.checkpoints)
    raise Stopped(
      number,
      f'stopped by {signal.Signals(number).name} after step {done}, which is '
      f'saved in {self.folder}; the same command goes on',
    )


def _say(text: str):
  if jax.process_index() == 0:
    tqdm.tqdm.write(f'tritera: {text}', file=sys.stderr)


def restore_run(
  folder: str | Path,
  at: int | None = None,
  devices: list | None = None,
  mesh: MeshConfig | None = None,
) -> tuple[Experiment, step.TrainState]:
  """Experiment and whole state of a run folder, laid out for training.

  Args:
    folder: the run's.
    at: step of a checkpoint; default: the newest.
    devices: to lay it out on; default: all.
    mesh: how; default: by the experiment's.

  Raises:
    FileNotFoundError: not a run folder, or it has no such checkpoint.
    ValueError: the checkpoint does not fit the run's experiment, or the mesh
      the devices.
  """
  experiment = save.read_experiment(folder)
  laid_out = mesh_lib.make_mesh(mesh or experiment.mesh, devices)
  target = step.abstract_state(experiment, laid_out)
  with restore.committed(folder, at) as (checkpoints, wanted):
    state = restore.restore_state(checkpoints, wanted, experiment.model, target)
  return experiment, state


def open_sources(experiment: Experiment) -> Sequence[shards.TokenSource]:
  """Every dataset of the mixture, checked against the model and each other."""
  data, model = experiment.data, experiment.model
  first = shards.read_manifest(data.path)
  # What is started from may have rows that no token of its tokenizer has.
  spare = bool(experiment.run.start_from)
  if first.vocab_size != model.vocab_size and not (
    spare and first.vocab_size < model.vocab_size
  ):
    raise ValueError(
      f'model.vocab_size={model.vocab_size}, but the tokenizer of {data.path} '
      f'has {first.vocab_size} tokens; set --model.vocab-size '
      f'{first.vocab_size}'
    )
  if model.document_separator not in (None, first.end_of_text):
    raise ValueError(
      f'model.document_separator={model.document_separator}, but documents of '
      f'{data.path} end with token {first.end_of_text}; set '
      f'--model.document-separator {first.end_of_text}'
    )
  sources = [shards.open_split(path, 'train') for path, _ in data.sources]
  for source in sources:
    if source.manifest.tokenizer != first.tokenizer:
      raise ValueError(
        f'the tokenizers of {source.root} and {data.path} differ; prepare one '
        f"with the other's: --tokenizer {data.path}/tokenizer.json"
      )
  steps, B, T = experiment.run.steps, data.batch_size, data.sequence_length
  epochs = loader.epochs(sources, data.schedule, steps, B, T)
  for source, count in zip(sources, epochs, strict=True):
    if data.max_epochs and count > data.max_epochs:
      raise ValueError(
        f'{source.root} would be read {count:.2f} times in {steps * B:,} '
        f'windows, more than data.max_epochs={data.max_epochs:g}; lower '
        'run.steps or its weight, or give more data'
      )
  return sources
