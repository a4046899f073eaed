# SPDX-License-Identifier: Apache-2.0
"""`tritera plan`: where a target comes from, and what is printed."""

import functools
import sys

import jax

from tritera_jax.experiment import Experiment
from tritera_jax.plan import plan, targets
from tritera_jax.plan.reliability import Assumptions

HERE = 'here'


def run(
  experiment: Experiment,
  target: str,
  *,
  assumed: Assumptions,
  tokens: float | None,
  compare: bool,
  compiles: int,
  check: int,
):
  """Prints a plan, and with `check` how far it is from a run on this machine.

  Raises:
    ValueError: no such target, nothing fits, or a check of another machine.
  """
  if tokens is not None:
    experiment = plan.with_tokens(experiment, tokens)
  if check and target != HERE:
    raise ValueError(
      f'--check {check} trains on this machine; give --target {HERE}, not '
      f'{target}'
    )
  if target == HERE:
    from tritera_jax.plan import here

    machine = here.measured(experiment)
    if check:
      print(here.check(experiment, machine, check))
      return
  else:
    # Nothing runs: no device of this machine is wanted.
    jax.config.update('jax_platforms', 'cpu')
    machine = targets.parse(target)
  made = plan.make(
    experiment,
    machine,
    assumed=assumed,
    compare=compare,
    compiles=compiles,
    say=functools.partial(print, file=sys.stderr, flush=True),
  )
  print(plan.words(made))
