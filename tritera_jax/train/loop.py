# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from collections.abc import Sequence
from pathlib import Path
import signal

import jax

from tritera_jax.checkpoint import restore, save
from tritera_jax.data import loader, shards
from tritera_jax.experiment import Experiment
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel import processes, rules
from tritera_jax.train import signals as signals_lib
from tritera_jax.train import step
from tritera_jax.train.observer import Observer
from tritera_jax.train.signals import Stopped


def train(experiment: Experiment, *, quiet: bool = False) -> step.TrainState:
  """Trains to run.steps, from the newest checkpoint if there is one.

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
      experiment.
    FloatingPointError: loss or gradient is not finite; the state before that
      step is saved.
    OSError: something could not be written.
    Stopped: by a signal; the state is saved.
  """
  data, run = experiment.data, experiment.run
  folder = Path(run.folder)
  sources = _open_sources(experiment)
  tokenizer = shards.read_tokenizer(data.path)
  mesh = mesh_lib.make_mesh(experiment.mesh)
  update = step.jitted(experiment, mesh)

  def open_folder():
    prints = [source.fingerprint for source in sources]
    save.write_experiment(experiment, folder, prints)
    tokenizer.save(str(folder / 'tokenizer.json'))

  processes.first_alone(open_folder)
  placed = step.batch_sharding(mesh)
  rows = rules.rows_here(placed, (data.batch_size, data.sequence_length + 1))

  with (
    jax.set_mesh(mesh),
    save.manager(folder, run.keep, run.keep_every) as checkpoints,
    signals_lib.received() as signals,
  ):
    state = _restore_or_init(experiment, mesh, checkpoints)
    start = int(state.step)
    batches = loader.batches(
      sources,
      data.schedule,
      batch_size=data.batch_size,
      sequence_length=data.sequence_length,
      seed=data.seed,
      rows=rows,
    )
    before = None  # what the step before measured
    with Observer(experiment, start, quiet) as observer:
      for n, batch in enumerate(loader.iterate(batches, start), start):
        if n == run.steps:
          break
        observer.before_update(n + 1, state, signals)
        tokens_BT1 = rules.assemble(
          placed, rows, batch['tokens'], data.batch_size
        )
        state, measured = update(state, tokens_BT1, n)
        # One step behind, so that the devices have work while we look.
        _check(experiment, before, n, checkpoints, state)
        before = measured
        if observer.wants(n + 1):
          _check(experiment, measured, n + 1, checkpoints, state)
        observer.after_update(n + 1, state, measured)
        stop = signals.stop  # once: it may come at any line
        if stop or _saves(experiment, n + 1):
          _check(experiment, measured, n + 1, checkpoints, state)
          _save(checkpoints, experiment, state)
        if stop:
          _stop(checkpoints, stop, n + 1, folder)
    save.wait(checkpoints)
  return state


def restore_run(
  folder: str | Path, at: int | None = None, devices: list | None = None
) -> tuple[Experiment, step.TrainState]:
  """Experiment and whole state of a run folder, laid out for training.

  Args:
    folder: the run's.
    at: step of a checkpoint; default: the newest.
    devices: to lay it out on, by the experiment's mesh; default: all.

  Raises:
    FileNotFoundError: not a run folder, or it has no such checkpoint.
    ValueError: the checkpoint does not fit the run's experiment, or the mesh
      the devices.
  """
  experiment = save.read_experiment(folder)
  mesh = mesh_lib.make_mesh(experiment.mesh, devices)
  target = step.abstract_state(experiment, mesh)
  with restore.committed(folder, at) as (checkpoints, wanted):
    state = restore.restore_state(checkpoints, wanted, experiment.model, target)
  return experiment, state


def _saves(experiment: Experiment, done: int) -> bool:
  run = experiment.run
  return (
    done == run.steps
    or done % run.save_every == 0
    or bool(run.keep_every and done % run.keep_every == 0)
  )


def _open_sources(experiment: Experiment) -> Sequence[shards.TokenSource]:
  """Every dataset of the mixture, checked against the model and each other."""
  data, model = experiment.data, experiment.model
  first = shards.read_manifest(data.path)
  if first.vocab_size != model.vocab_size:
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


def _restore_or_init(experiment, mesh, checkpoints) -> step.TrainState:
  newest = checkpoints.latest_step()
  if newest is None:
    return step.jitted_init(experiment, mesh)()
  target = step.abstract_state(experiment, mesh)
  return restore.restore_state(checkpoints, newest, experiment.model, target)


def _save(
  checkpoints: save.Manager,
  experiment: Experiment,
  state: step.TrainState,
):
  """Under the step of the state, unless it is there."""
  done = int(state.step)
  if done != checkpoints.latest_step():
    save.save(checkpoints, done, experiment.model, state)


def _check(
  experiment: Experiment,
  measured: dict | None,
  n: int,
  checkpoints: save.Manager,
  state: step.TrainState,
):
  """Saves the state and raises, if update n was not made."""
  if measured is None or measured['updated']:
    return
  # The state is that before the update: it waits, see `step.train_step`.
  _save(checkpoints, experiment, state)
  save.wait(checkpoints)
  raise FloatingPointError(
    f'loss is {float(measured["loss"])} and gradient_norm '
    f'{float(measured["gradient_norm"])} at step {n}; the state before it is '
    f'saved as checkpoint {n - 1} of {experiment.run.folder}'
  )


def _stop(checkpoints: save.Manager, number: int, done: int, folder: Path):
  save.wait(checkpoints)
  raise Stopped(
    number,
    f'stopped by {signal.Signals(number).name} after step {done}, which is '
    f'saved in {folder}; the same command goes on',
  )
