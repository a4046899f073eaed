# SPDX-License-Identifier: Apache-2.0
"""Ways to lay a run out on a target, and which of them is best."""

from collections.abc import Iterator
import dataclasses
import itertools
import typing
from typing import Any

from tritera_jax.experiment import Experiment
from tritera_jax.model.decoder import Remat
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.plan import costs
from tritera_jax.plan.costs import Costs
from tritera_jax.plan.targets import Target

REMATS: tuple[Remat, ...] = typing.get_args(Remat)
# Past it tensor parallelism leaves a node of GPUs, and shares are small.
_MOST_TENSOR = 8
_MOST_CONTEXT = 4
# By how much another gather than XLA's has to win: the estimate counts what is
# sent, and not the work of packing it.
_WORTH = 1.03


@dataclasses.dataclass(frozen=True)
class Choice:
  """An experiment laid out in one way, and what that costs."""

  experiment: Experiment
  costs: Costs

  @property
  def flags(self) -> str:
    """As a command line says it."""
    mesh, run = self.experiment.mesh, self.experiment.run
    said = {f'mesh.{axis}': getattr(mesh, axis) for axis in mesh_lib.AXES}
    if said['mesh.context'] == 1:
      del said['mesh.context']
    said |= {'run.remat': run.remat, 'run.accumulation': run.accumulation}
    if run.gather != 'auto':
      said['run.gather'] = run.gather
    return ' '.join(f'--{name} {value}' for name, value in said.items())


def ranked(experiment: Experiment, target: Target) -> list[Choice]:
  """For each mesh the best way, fastest first; then those that do not fit.

  Of each mesh every remat policy is tried, each with the fewest parts of the
  batch that fit.

  Raises:
    ValueError: no mesh divides the model and the batch over the devices.
  """
  best, refusal = [], None
  for sizes in meshes(target.devices, experiment.data.batch_size):
    of_mesh = []
    for settings in _settings(experiment, sizes):
      try:
        of_mesh.append(_fewest_parts(experiment, target, sizes, settings))
      except ValueError as error:
        refusal = refusal or error
        break
    if of_mesh:
      best.append(_best(of_mesh))
  if not best:
    raise ValueError(
      f'--target {target.name}: no mesh of {target.devices} devices divides '
      f'the model and data.batch_size={experiment.data.batch_size} (the first '
      f'of them: {refusal}); give a larger batch or fewer devices'
    )
  return sorted(best, key=_order)


def own(experiment: Experiment, target: Target) -> Choice:
  """The experiment as it is.

  Raises:
    ValueError: its mesh does not fit the target, the model or the batch.
  """
  sizes = costs.check_mesh(experiment, target.devices)
  mesh = dataclasses.replace(experiment.mesh, **sizes)
  experiment = dataclasses.replace(experiment, mesh=mesh)
  return Choice(experiment, costs.of(experiment, target))


def meshes(devices: int, rows: int) -> Iterator[dict[str, int]]:
  """Axis sizes that make up so many devices, for a batch of so many rows.

  Sequences are split only where there are not enough of them.
  """
  contexts = [1]
  if rows < devices:
    contexts = [c for c in _divisors(devices) if c <= _MOST_CONTEXT]
  for tensor, context in itertools.product(_divisors(devices), contexts):
    left, odd = divmod(devices, tensor * context)
    if tensor > _MOST_TENSOR or odd:
      continue
    for fsdp in _divisors(left):
      yield {
        'data': left // fsdp,
        'fsdp': fsdp,
        'context': context,
        'tensor': tensor,
      }


def _settings(
  experiment: Experiment, sizes: dict[str, int]
) -> Iterator[dict[str, Any]]:
  """Of run, what can be chosen for a mesh."""
  gathers = ['auto']
  if experiment.model.family == 'ternary' and sizes['fsdp'] > 1:
    gathers.append('two_bit')
  for remat, gather in itertools.product(REMATS, gathers):
    yield {'remat': remat, 'gather': gather}


def why_not(choice: Choice, best: Choice) -> str:
  """Why another is proposed."""
  theirs, ours = choice.costs, best.costs
  if not theirs.fits:
    return (
      f'needs {theirs.peak_memory / 1e9:.1f} GB of {theirs.capacity / 1e9:.1f}'
    )
  more = {
    name: getattr(theirs, term) - getattr(ours, term)
    for name, term in (
      ('compute', 'compute'), ('memory traffic', 'reading'),
      ('network', 'network'),
    )
  }  # fmt: skip
  name = max(more, key=lambda term: more[term])
  if theirs.seconds < 1.02 * ours.seconds:
    return 'as fast, by this estimate'
  return f'{theirs.seconds / ours.seconds:.2f}x: {name} +{more[name]:.3g} s'


def _best(of_mesh: list[Choice]) -> Choice:
  """The fastest that fits; XLA's own gather unless another is worth it."""
  best = min(of_mesh, key=_order)
  plain = [c for c in of_mesh if c.experiment.run.gather == 'auto']
  if plain:
    own = min(plain, key=_order)
    if own.costs.fits and own.costs.seconds <= _WORTH * best.costs.seconds:
      return own
  return best


def _order(choice: Choice) -> tuple[bool, float, float]:
  cost = choice.costs
  speed = cost.seconds if cost.fits else cost.peak_memory
  return not cost.fits, speed, cost.peak_memory


def _fewest_parts(
  experiment: Experiment,
  target: Target,
  sizes: dict[str, int],
  settings: dict[str, Any],
) -> Choice:
  mesh = dataclasses.replace(experiment.mesh, **sizes)
  shares = sizes['data'] * sizes['fsdp']
  rows = experiment.data.batch_size
  if rows % shares:
    raise ValueError(
      f'data.batch_size={rows} is no multiple of mesh.data={sizes["data"]} x '
      f'mesh.fsdp={sizes["fsdp"]}'
    )
  choice = None
  for parts in _divisors(rows // shares):
    run = dataclasses.replace(experiment.run, accumulation=parts, **settings)
    laid_out = dataclasses.replace(experiment, mesh=mesh, run=run)
    choice = Choice(laid_out, costs.of(laid_out, target))
    if choice.costs.fits:
      break
  assert choice is not None
  return choice


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
