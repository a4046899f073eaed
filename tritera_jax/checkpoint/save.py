# SPDX-License-Identifier: Apache-2.0
"""Run folders and their Orbax checkpoints: writing.

A run folder holds `experiment.json`, written before anything else, and
`checkpoints/<step>/{model,params,rest,digests}`: the ModelConfig as JSON, which
says what the arrays mean; the parameters, an item of their own so that they can
be restored alone; what else training needs to go on; and a digest of each item
of arrays, since not every flipped bit is noticed by what reads the files. Only
this module, `restore` and `staged` name Orbax.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
import subprocess
import time
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree
import orbax.checkpoint as ocp

from tritera_jax import experiment as experiment_lib
from tritera_jax.checkpoint import staged
from tritera_jax.experiment import Experiment, RunConfig
from tritera_jax.model.config import ModelConfig
from tritera_jax.parallel import digest as digest_lib

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


Manager = ocp.CheckpointManager


@dataclasses.dataclass
class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """The newest checkpoints, and those that a run keeps for good."""

  run: RunConfig

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    newest = len(checkpoints) - self.run.keep
    return [
      n >= newest or self.run.keeps(checkpoint.step)
      for n, checkpoint in enumerate(checkpoints)
    ]


def manager(
  folder: Path, run: RunConfig | None = None, *, alone: bool = False
) -> ocp.CheckpointManager:
  """Orbax's manager of a run folder; saves are asynchronous.

  Args:
    folder: the run's.
    run: says which checkpoints are kept; None: all are.
    alone: to read, each process for itself: one that cannot must not leave the
      others in a barrier.
  """
  multiprocessing = ocp.options.MultiprocessingOptions()
  if alone:
    me = jax.process_index()
    multiprocessing = ocp.options.MultiprocessingOptions(
      primary_host=me,
      active_processes={me},
      barrier_sync_key_prefix=f'alone{me}',
    )
  return ocp.CheckpointManager(
    (folder / 'checkpoints').resolve(),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=_Kept(run) if run else None,
      enable_async_checkpointing=not alone,
      create=not alone,
      cleanup_tmp_directories=not alone,  # what a crash left half written
      multiprocessing_options=multiprocessing,
    ),
    item_handlers={
      'model': ocp.JsonCheckpointHandler(),
      'digests': ocp.JsonCheckpointHandler(),
      'params': ocp.StandardCheckpointHandler(),
      'rest': ocp.StandardCheckpointHandler(),
    },
  )


@contextlib.contextmanager
def writing(
  folder: Path, run: RunConfig, *, agreed: tuple[type[Exception], ...] = ()
) -> Iterator[Manager]:
  """The manager, closed at the end of the block, when all is committed.

  Args:
    folder: as of `manager`.
    run: as of `manager`.
    agreed: exceptions that all processes raise alike. After another the
      manager is left open, unless this process is the only one: to close it
      is to wait for the others.
  """
  checkpoints = manager(folder, run)
  try:
    yield checkpoints
  except Exception as error:
    if jax.process_count() == 1 or isinstance(error, agreed):
      checkpoints.close()
    raise
  checkpoints.close()


class Weights(NamedTuple):
  """A state of parameters alone, which nothing trains on."""

  params: PyTree


def items(state: Any) -> dict[str, PyTree]:
  """The checkpoint's items of arrays: `params`, and the rest of the state.

  Of `Weights` there is no rest.
  """
  rest = state._asdict()
  found = {'params': rest.pop('params'), 'rest': rest}
  return {name: item for name, item in found.items() if item}


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  model: ModelConfig,
  state: Any,
):
  """Starts saving under `step`; returns once the arrays are copied out.

  Args:
    checkpoints: of `manager`.
    step: updates made.
    model: what the parameters are of.
    state: a NamedTuple of all that training needs, `params` among it.

  Raises:
    OSError: the save before this one could not be written.
  """
  wait(checkpoints)  # Orbax would too, and fail in its own words
  there = items(state)
  arrays = {
    k: ocp.args.StandardSave(v, staged.save_args(v)) for k, v in there.items()
  }
  try:
    saving = checkpoints.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.JsonSave(dataclasses.asdict(model)),
        digests=ocp.args.JsonSave(
          {k: f'{_digest(v):08x}' for k, v in there.items()}
        ),
        **arrays,
      ),
    )
  except (ValueError, OSError) as error:
    raise _not_saved(checkpoints, error) from None
  if not saving:
    raise _not_saved(checkpoints, f'step {step} is not newer than those')


digest = jax.jit(digest_lib.digest)


def _digest(tree: PyTree) -> int:
  if staged.is_staged(tree):
    return digest_lib.digest_on_disk(tree)
  return int(digest(tree))


class Pace:
  """Says when a periodic save would hold training up too much.

  Attributes:
    share: of the time, that saves may take.
    blocked: seconds that the last one held training up.
    ended: when it did (time.monotonic).
  """

  def __init__(self, share: float):
    self.share, self.blocked, self.ended = share, 0.0, time.monotonic()

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    started = time.monotonic()
    yield
    self.ended = time.monotonic()
    self.blocked = self.ended - started

  def busy(self, *, writing: bool) -> bool:
    """Whether one would, now; `writing`: the last one is not committed yet."""
    if self.share == 1:
      return False
    waited = time.monotonic() - self.ended
    return writing or self.blocked > self.share * waited


def wait(checkpoints: ocp.CheckpointManager):
  """Returns when what was being saved is committed.

  Raises:
    OSError: it could not be written.
  """
  try:
    checkpoints.wait_until_finished()
  except (ValueError, OSError) as error:  # TensorStore's, in Orbax's thread
    raise _not_saved(checkpoints, error) from None


class NotSavedError(OSError):
  """A checkpoint could not be written; those before it stand."""


def _not_saved(checkpoints: Manager, error: Exception | str) -> NotSavedError:
  return NotSavedError(
    f'a checkpoint could not be written to {checkpoints.directory}; those '
    f'of steps {sorted(checkpoints.all_steps())} stand, and the same command '
    f'goes on from the newest: {error}'
  )


def write_experiment(
  experiment: Experiment,
  folder: Path,
  sources: Sequence[str] = (),
  done: int | None = None,
):
  """Writes experiment.json, or checks the one that is there.

  A mixture may change from the newest checkpoint on: the file is written
  anew, with what stood there under 'before'.

  Args:
    experiment: what is about to be trained.
    folder: the run's.
    sources: fingerprints of its datasets' tokens; none: as they were.
    done: the newest checkpoint is made from the batches below this; default:
      as many as it has updates.

  Raises:
    ValueError: the folder belongs to another experiment; every differing
      field is named.
  """
  file = folder / 'experiment.json'
  before = []
  if done is None:
    done = latest_step(folder) or 0
  if file.exists():
    there, record = read_experiment(folder), json.loads(file.read_text())
    was = record.get('sources', [])
    sources = list(sources) or was
    check_same(there, experiment, folder, done)
    _check_sources(was, sources, experiment, done)
    if there.data.schedule == experiment.data.schedule and was == sources:
      return
    before = [*record.pop('before', []), record | {'until_batch': done}]
  folder.mkdir(parents=True, exist_ok=True)
  text = experiment_lib.to_json(experiment)
  record = {
    'experiment': json.loads(text),
    'digest': hashlib.sha256(text.encode()).hexdigest(),
    'sources': list(sources),
    'commit': git_commit(),
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  } | ({'before': before} if before else {})
  partial = file.with_suffix('.partial')
  partial.write_text(json.dumps(record, indent=2) + '\n')
  partial.rename(file)


def read_experiment(folder: str | Path) -> Experiment:
  """The experiment of a run folder.

  Raises:
    FileNotFoundError: not a run folder.
    ValueError: its experiment.json is malformed.
  """
  file = Path(folder) / 'experiment.json'
  if not file.is_file():
    raise FileNotFoundError(
      f'{folder} is not a run folder: it has no experiment.json'
    )
  try:
    record = json.loads(file.read_text())['experiment']
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{file} is not an experiment record: {error!r}') from None
  return experiment_lib.from_json(json.dumps(record), str(file))


def read_model(folder: str | Path) -> ModelConfig:
  """The model of a run folder, for an experiment that starts from it.

  Raises:
    FileNotFoundError: not a run folder.
    ValueError: its experiment.json is malformed.
  """
  return read_experiment(folder).model


def latest_step(folder: str | Path) -> int | None:
  """The newest committed step of a run folder; None if there is none.

  Without a manager, which all processes would have to open together.
  """
  checkpoints = Path(folder) / 'checkpoints'
  if not checkpoints.is_dir():
    return None
  return max(ocp.utils.checkpoint_steps(checkpoints), default=None)


def check_same(old: Experiment, new: Experiment, folder: Path, done: int = 0):
  """Refuses to go on with a run as another experiment.

  Args:
    old: of the run's folder.
    new: what is to be run.
    folder: the run's.
    done: batches that were made, for which the mixture may not change.

  Raises:
    ValueError: results would differ; every differing field is named.
  """
  # Of the run, what changes a result; never where data lie and on how many
  # devices, how often to look or save, or how memory is spent. Of a mixture
  # the shares, as far as they were used.
  free = {f'run.{field.name}' for field in dataclasses.fields(new.run)} - {
    'run.steps', 'run.seed', 'run.start_from',
  } | {
    'data.path', 'data.max_epochs', 'data.mixture', 'data.reweighted',
  }  # fmt: skip
  differing = [
    difference
    for difference in differences(_fields(old), _fields(new))
    if not difference.startswith('mesh.')
    and difference.partition(':')[0] not in free
  ]
  was, now = _used(old, done), _used(new, done)
  if was != now:
    first = min(step for step, _ in was ^ now)
    differing.append(
      f'data.mixture: batch {first} was drawn by other shares; of the {done} '
      f'batches made, those by first batch are {dict(sorted(was))}, here '
      f'{dict(sorted(now))}; new weights stand in data.reweighted, from step '
      f'{done} on'
    )
  if differing:
    raise ValueError(
      f'{folder} holds a run of another experiment ({"; ".join(differing)}); '
      'choose another --run.folder, or delete this one'
    )


def _check_sources(
  was: Sequence[str], now: Sequence[str], experiment: Experiment, done: int
):
  stretches = [shares for _, shares in _used(experiment, done)]
  used = {i for shares in stretches for i, x in enumerate(shares) if x}
  paths = [path for path, _ in experiment.data.sources]
  for i, (before, here) in enumerate(zip(was, now, strict=False)):
    if i in used and before != here:
      raise ValueError(
        f'{paths[i]} has other tokens than dataset {i} of the {done} batches '
        'that were made; give the one that was trained on'
      )


def _used(experiment: Experiment, done: int) -> set[tuple[int, tuple]]:
  """The stretches of `DataConfig.schedule` that begin before batch `done`.

  Without datasets at the end that had no share yet.
  """
  used = set()
  for first, shares in experiment.data.schedule:
    length = max(i + 1 for i, share in enumerate(shares) if share)
    if first < done:
      used.add((first, shares[:length]))
  return used


def _fields(experiment: Experiment) -> dict:
  return json.loads(experiment_lib.to_json(experiment))


def differences(there: dict, here: dict, prefix: str = '') -> list[str]:
  """Fields of two JSON objects that differ, by dotted name."""
  found = []
  for name in sorted({*there, *here}):
    old, new = there.get(name), here.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
      found += differences(old, new, f'{prefix}{name}.')
    elif old != new:
      found.append(f'{prefix}{name}: {old!r} there, {new!r} here')
  return found


def git_commit() -> str | None:
  """The commit of the code, with '+' if the tree was changed; None if none."""
  here = Path(__file__).parent

  def git(*arguments):
    return subprocess.run(
      ['git', '-C', here, *arguments],
      capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip

  try:
    changed = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('+' if changed else '')
  except (OSError, subprocess.CalledProcessError):
    return None
