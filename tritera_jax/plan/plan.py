# SPDX-License-Identifier: Apache-2.0
"""What a run would take on a machine, before it is paid for."""

from collections.abc import Callable
import dataclasses

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.plan import aot, choices, costs, reliability
from tritera_jax.plan.aot import Compiled
from tritera_jax.plan.choices import Choice
from tritera_jax.plan.reliability import Assumptions, Saving
from tritera_jax.plan.targets import Target

_SHOWN = 8  # of the meshes that lost
_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Plan:
  """A proposal, what it was compared with, and what follows from it.

  Attributes:
    target: the machine.
    best: what is proposed, its network corrected by the compiler.
    estimated: the same, by the estimate alone: as the others are.
    compiled: what the compiler said of it, or None.
    uncompiled: why it was not compiled; '' if it was.
    also: those that were compiled too.
    others: the other meshes, by the estimate.
    rejected: those that the compiler refused, and its words.
    own: the experiment as it is, or why it cannot run there.
    saving: when to save.
    assumed: about failures and saves.
  """

  target: Target
  best: Choice
  estimated: Choice
  compiled: Compiled | None
  uncompiled: str
  also: list[Choice]
  others: list[Choice]
  rejected: list[tuple[Choice, str]]
  own: Choice | str
  saving: Saving
  assumed: Assumptions

  @property
  def days(self) -> float:
    """Of the whole run, with what failures and saves cost."""
    steps = self.best.experiment.run.steps
    return steps * self.best.costs.seconds / self.saving.goodput / _DAY


def with_tokens(experiment: Experiment, tokens: float) -> Experiment:
  """The same run for so many tokens, in whole steps.

  Raises:
    ValueError: fewer than a step's.
  """
  steps = int(tokens // experiment.batch_tokens)
  if steps < 1:
    raise ValueError(
      f'--tokens {tokens:g} is less than one step of '
      f'{experiment.batch_tokens:,}; give more'
    )
  run = dataclasses.replace(experiment.run, steps=steps)
  return dataclasses.replace(experiment, run=run)


def make(
  experiment: Experiment,
  target: Target,
  *,
  assumed: Assumptions,
  compare: bool,
  compiles: int,
  say: Callable[[str], None],
) -> Plan:
  """Compares, compiles the best, proposes.

  Args:
    experiment: what is to be trained.
    target: on which machine.
    assumed: about failures and saves.
    compare: all meshes; False: plan with the experiment's own.
    compiles: how many of the best to compile, where there is a compiler.
    say: is told what takes minutes.

  Raises:
    ValueError: nothing fits, or, without `compare`, the experiment does not.
  """
  own: Choice | str
  if compare:
    # A mesh of another number of devices is refused; a batch it cannot divide
    # is what the comparison is for.
    mesh_lib.axis_sizes(experiment.mesh, target.devices)
    try:
      own = choices.own(experiment, target)
    except ValueError as error:
      own = str(error)
    ranked = choices.ranked(experiment, target)
  else:
    own = choices.own(experiment, target)
    ranked = [own]
  fitting = [choice for choice in ranked if choice.costs.fits]
  if not fitting:
    least = min(ranked, key=lambda choice: choice.costs.peak_memory)
    raise ValueError(
      f'--target {target.name}: a device has '
      f'{least.costs.capacity / 1e9:.1f} GB for a program, and '
      f'{least.flags} needs {least.costs.peak_memory / 1e9:.1f} (estimate)'
      f'{", the least of all" if compare else ""}; take more devices, '
      'or larger ones'
    )
  uncompiled = aot.why_not(target) or ('' if compiles else 'not asked for')
  done, rejected = [], []
  for choice in fitting:
    if uncompiled or len(done) == compiles:
      break
    say(f'compiling for {target.devices} x {target.chip.kind}: {choice.flags}')
    try:
      compiled = aot.compile(choice.experiment, target)
    except aot.Refused as error:
      rejected.append((choice, str(error)))
      continue
    done.append((_corrected(choice, compiled, target), compiled))
  also = []
  if done:
    done.sort(key=lambda pair: pair[0].costs.seconds)
    (best, compiled), *rest = done
    also = [choice for choice, _ in rest]
  elif rejected:
    raise ValueError(
      f'--target {target.name}: the compiler refused each of '
      f'{len(rejected)} ways that should fit; the last: {rejected[-1][1]}'
    )
  else:
    best, compiled = fitting[0], None
  cost = best.costs
  saving = reliability.saving(
    assumed, target.devices, cost.memory['state'], cost.seconds
  )
  told = [c.experiment for c in (best, *also, *(c for c, _ in rejected))]
  others = [choice for choice in ranked if choice.experiment not in told]
  estimated = next(c for c in fitting if c.experiment == best.experiment)
  return Plan(
    target, best, estimated, compiled, uncompiled, also, others, rejected, own,
    saving, assumed,
  )  # fmt: skip


def _corrected(choice: Choice, compiled: Compiled, target: Target) -> Choice:
  """The same, with the network's seconds by the compiled collectives."""
  nbytes = sum(compiled.sent.values())
  network = nbytes / target.chip.fast / costs.NETWORK_EFFICIENCY
  return dataclasses.replace(
    choice, costs=dataclasses.replace(choice.costs, network=network)
  )


def words(plan: Plan) -> str:
  """The plan as lines of name, how it is known, and what it says."""
  rows = [*_run_rows(plan), *_step_rows(plan), *_whole_rows(plan)]
  widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
  lines = [
    f'{name:<{widths[0]}}  {how:<{widths[1]}}  {text}'
    for name, how, text in rows
  ]
  return '\n'.join([*lines, '', *_comparison(plan)])


def _run_rows(plan: Plan):
  experiment, chip = plan.best.experiment, plan.target.chip
  model = experiment.model
  per_token = flops.training_flops_per_token(
    model, experiment.data.sequence_length
  )
  yield 'model', 'exact', f'{flops.parameters(model):,} parameters'
  yield (
    'tokens',
    'exact',
    f'{experiment.tokens:,} = {experiment.run.steps:,} steps x '
    f'{experiment.data.batch_size} x {experiment.data.sequence_length}, '
    f'{per_token * experiment.tokens:.3g} model FLOPs',
  )
  yield (
    'machine',
    'data sheet' if 'measured' not in chip.source else 'measured',
    f'{plan.target.devices} x {chip.kind}: {chip.peak / 1e12:.4g} TFLOP/s, '
    f'{chip.memory / 1e9:.4g} GB at {chip.bandwidth / 1e9:.4g} GB/s'
    + (
      f', network {chip.fast / 1e9:g} GB/s in a domain of '
      f'{plan.target.domain}, {chip.slow / 1e9:g} beyond'
      if plan.target.devices > 1
      else ''
    )
    + f' ({chip.source})',
  )
  yield 'proposal', '', plan.best.flags


def _step_rows(plan: Plan):
  cost, experiment = plan.best.costs, plan.best.experiment
  parts = ', '.join(
    f'{name} {nbytes / 1e9:.3g}' for name, nbytes in cost.memory.items()
  )
  yield (
    'memory',
    'estimate',
    f'{cost.peak_memory / 1e9:.3g} of {cost.capacity / 1e9:.3g} GB a device '
    f'({parts}; blocks and loss at other times)',
  )
  if plan.compiled:
    got = plan.compiled.arguments + plan.compiled.temporaries
    yield (
      'memory',
      'compiled',
      f'{got / 1e9:.3g} GB: arguments {plan.compiled.arguments / 1e9:.3g}, '
      f'temporaries {plan.compiled.temporaries / 1e9:.3g}; '
      f'{got / cost.peak_memory:.2f} x the estimate',
    )
  work = cost.flops * plan.target.devices
  yield (
    'FLOPs',
    'counted',
    f'{cost.model_flops:.4g} a step of the model, {work:.4g} in all matmuls '
    f'({work / cost.model_flops:.2f} x: remat, whole T x T attention)',
  )
  total = sum(c.bytes for c in cost.collectives)
  parts = ', '.join(
    f'{c.name} over {c.axis} {c.bytes / 1e9:.3g}' for c in cost.collectives
  )
  yield (
    'collectives',
    'estimate',
    f'{total / 1e9:.3g} GB a step to each device'
    + (f' ({parts})' if parts else ''),
  )
  if plan.compiled:
    kinds = plan.compiled.sent
    got = sum(kinds.values())
    parts = ', '.join(f'{op} {n / 1e9:.3g}' for op, n in kinds.items())
    ratio = f'; {got / total:.2f} x the estimate' if total else ''
    yield (
      'collectives',
      'compiled',
      f'{got / 1e9:.3g} GB a step from each device ({parts}){ratio}',
    )
  tokens = experiment.batch_tokens / cost.seconds
  yield (
    'step',
    'estimate',
    f'{cost.seconds:.3g} s, between {cost.least:.3g} (all overlaps) and '
    f'{cost.most:.3g} (nothing does): compute {cost.compute:.3g}, memory '
    f'traffic {cost.reading:.3g}, network {cost.network:.3g}, at '
    f'{costs.MATMUL_EFFICIENCY:.0%}, {costs.MEMORY_EFFICIENCY:.0%} and '
    f'{costs.NETWORK_EFFICIENCY:.0%} of the peaks',
  )
  low, mid, high = (
    f'{costs.mfu(experiment, plan.target, seconds):.1%}'
    for seconds in (cost.most, cost.seconds, cost.least)
  )
  bound = 'memory traffic' if cost.bound == 'reading' else cost.bound
  yield (
    'speed',
    'estimate',
    f'{tokens:,.0f} tokens/s, MFU {mid} ({low} to {high}); largest term: '
    f'{bound}',
  )


def _whole_rows(plan: Plan):
  experiment, cost, saving = plan.best.experiment, plan.best.costs, plan.saving
  one = tuple((axis, 1) for axis in mesh_lib.AXES)
  checkpoint, _ = costs.state_bytes(costs.stateless(experiment), one)
  every = max(1, round(saving.interval / cost.seconds))
  yield (
    'checkpoint',
    'exact',
    f'{checkpoint / 1e9:.4g} GB before compression, '
    f'{cost.memory["state"] / 1e9:.3g} a device',
  )
  yield (
    'save',
    'estimate',
    f'--run.save-every {every}: each {saving.interval / 60:.0f} minutes, by '
    f'Young, sqrt(2 x {saving.cost:.2g} s x {saving.failures / 3600:.3g} h '
    'between failures)',
  )
  yield (
    'goodput',
    'estimate',
    f'{saving.goodput:.2%}, if a device fails each '
    f'{plan.assumed.failure_hours:,.0f} h and it takes '
    f'{plan.assumed.restart_seconds:.0f} s to be back',
  )
  hours = plan.days * 24 * plan.target.devices
  quick, slow = (
    plan.days * seconds / cost.seconds for seconds in (cost.least, cost.most)
  )
  yield (
    'run',
    'estimate',
    f'{plan.days:.3g} days ({quick:.3g} to {slow:.3g}), {hours:,.0f} '
    'device-hours',
  )


def _comparison(plan: Plan):
  if isinstance(plan.own, str):
    yield f'as the experiment says it cannot run: {plan.own}'
  elif plan.own.experiment != plan.best.experiment:
    cost = plan.own.costs
    fit = '' if cost.fits else ' and does not fit'
    yield (
      f'as the experiment says ({plan.own.flags}): {cost.seconds:.3g} s a '
      f'step, {cost.peak_memory / 1e9:.1f} GB{fit} (estimate)'
    )
  for choice, reason in plan.rejected:
    yield f'the compiler refused {choice.flags}: {reason}'
  for choice in plan.also:
    yield (
      f'compiled too: {choice.flags}: {choice.costs.seconds:.3g} s, '
      f'{choices.why_not(choice, plan.best)}'
    )
  if plan.uncompiled:
    yield f'not compiled: {plan.uncompiled}'
  if not plan.others:
    return
  yield (
    'the other meshes, each at its best (estimate; the proposal: '
    f'{plan.estimated.costs.seconds:.3g} s by the same)'
  )
  for choice in plan.others[:_SHOWN]:
    cost = choice.costs
    yield (
      f'  {choice.flags:<86} {cost.seconds:7.3g} s '
      f'{cost.peak_memory / 1e9:6.1f} GB  '
      f'{choices.why_not(choice, plan.estimated)}'
    )
  left = plan.others[_SHOWN:]
  if left:
    bad = sum(not choice.costs.fits for choice in left)
    yield f'  and {len(left)} slower ones, {bad} of which do not fit'
