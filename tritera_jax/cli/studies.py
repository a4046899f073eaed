# SPDX-License-Identifier: Apache-2.0
"""Verbs that say what runs would take, or what they taught."""

import functools
from pathlib import Path
import sys
from typing import Annotated

import tqdm
import tyro
from tyro.conf import Positional

from tritera_jax.cli.arguments import (
  BARE,
  keep_compiled,
  resolve,
  with_overrides,
)


def show(args: list[str]):
  from tritera_jax.experiment import Experiment

  def show(
    experiment: Annotated[Experiment, BARE] = resolve('show', args),
  ):
    """An experiment's size and cost.

    Args:
      experiment: as the file says, but for what is given here.
    """
    from tritera_jax import show

    print(show.describe(experiment))

  with_overrides('show', args, show)


def plan(args: list[str]):
  from tritera_jax.experiment import Experiment
  from tritera_jax.plan.reliability import Assumptions

  def plan(
    experiment: Annotated[Experiment, BARE] = resolve('plan', args),
    assume: Assumptions = Assumptions(),
    *,
    target: str,
    tokens: float | None = None,
    compare: bool = True,
    compiles: int = 1,
    check: int = 0,
  ):
    """What a run would take on a machine that is not here, and how to lay it
    out there. Every line says whether it is exact, compiled or an estimate.

    Args:
      experiment: as the file says, but for what is given here.
      assume: about failures and saves.
      target: CHIP-N, such as v5e-256 or h100-1024; `here` is this machine,
        measured on the spot.
      tokens: of the whole run, in place of run.steps.
      compare: meshes, remat policies and parts of the batch; without: plan
        with those of the experiment.
      compiles: how many of the best to compile, where libtpu is installed.
      check: steps to train here on random tokens, to compare the estimates
        with; only with --target here.
    """
    from tritera_jax.plan import command

    command.run(
      experiment,
      target,
      assumed=assume,
      tokens=tokens,
      compare=compare,
      compiles=compiles,
      check=check,
    )

  with_overrides('plan', args, plan)


def scaling(args: list[str]):
  from tritera_jax.scaling.costs import Serving
  from tritera_jax.scaling.plan import Budget
  from tritera_jax.scaling.report import publish
  from tritera_jax.scaling.report.analysis import Options

  def scaling(
    runs: Positional[tuple[Path, ...]],
    options: Annotated[Options, BARE] = Options(),
    serving: Serving = Serving(),
    budget: Budget = Budget(),
    *,
    out: Path,
  ):
    """Fits scaling laws to finished runs and says how far to trust them.

    Args:
      runs: tables, runs.jsonl or folders with one; at least one.
      options: how they are analysed.
      serving: what serving is assumed to take.
      budget: one more to plan for.
      out: folder for report.md, constants.json and pictures.
    """
    if not runs:
      print('usage: tritera scaling RUNS [RUNS ...] --out OUT', file=sys.stderr)
      raise SystemExit(2)
    if options.warning:
      print(f'tritera scaling: {options.warning}', file=sys.stderr)
    publish.write(runs, out, options, serving, budget)
    print(out / 'report.md')

  tyro.cli(scaling, args=args, prog='tritera scaling')


def dynamics(args: list[str]):
  from tritera_jax.eval.interference import Tokens
  from tritera_jax.scaling.dynamics.deceleration import Curve

  def dynamics(
    run: Positional[Path],
    out: Path | None = None,
    tokens: Tokens = Tokens(),
    curve: Curve = Curve(),
  ):
    """How a run learned: where its loss decelerated, and whether its tokens
    came to want opposite things.

    Args:
      run: run folder, trained with --run.keep-powers.
      out: folder for what is measured, pictures and JSON; default:
        RUN/dynamics.
      tokens: held-out tokens that are measured.
      curve: how the training loss is fitted.
    """
    from tritera_jax.eval import interference
    from tritera_jax.scaling.dynamics import files, report

    out = out or run / 'dynamics'
    bar = functools.partial(tqdm.tqdm, unit='checkpoint', leave=False)
    keep_compiled(run)
    interference.collect(run, out, tokens, progress=bar)
    found = files.read(out, curve)
    print(report.text(found))
    for path in report.write({run.name: found}, out):
      print(path)

  tyro.cli(dynamics, args=args, prog='tritera dynamics')
