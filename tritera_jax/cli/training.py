# SPDX-License-Identifier: Apache-2.0
"""Verbs that make runs, or say how they went."""

import functools
from pathlib import Path
import sys
from typing import Annotated

import tyro
from tyro.conf import Positional

from tritera_jax.cli.arguments import (
  BARE,
  bytes_bar,
  keep_compiled,
  resolve,
  with_names,
  with_overrides,
)


def prepare(args: list[str]):
  from tritera_jax.data import prepare

  with bytes_bar() as progress:
    summary = tyro.cli(
      with_names(prepare.prepare, progress=progress),
      args=args,
      prog='tritera prepare',
      config=(tyro.conf.PositionalRequiredArgs,),
    )
  print(summary)


def train(args: list[str]):
  from tritera_jax.experiment import Experiment
  from tritera_jax.parallel import processes
  from tritera_jax.parallel.processes import Launch

  def train(
    experiment: Annotated[Experiment, BARE] = resolve('train', args),
    launch: Annotated[Launch, BARE] = Launch(),
    dry_run: bool = False,
  ):
    """Trains, or goes on from the newest checkpoint.

    Args:
      experiment: as the file says, but for what is given here.
      launch: of several processes.
      dry_run: say what this process would be and check what can be checked
        without the others and their devices; train nothing.
    """
    from tritera_jax.train import exits, loop, metrics, step

    if dry_run:
      words, sizes = processes.plan(processes.find(launch), experiment.mesh)
      if sizes:
        step.check_batch(experiment, sizes)
      print(words)
      return
    place = processes.start(launch)
    processes.check_devices(place, experiment.mesh)
    if place.processes > 1:
      text = processes.device_map(experiment.mesh)
      if place.process == 0:
        print(text, file=sys.stderr)
    keep_compiled(experiment.run.folder)
    with exits.told(place.processes):
      loop.train(experiment)
    if place.process == 0:
      print(f'loss curve: {metrics.plot(experiment.run.folder)}')

  with_overrides('train', args, train)


def sweep(args: list[str]):
  from tritera_jax import experiment_file
  from tritera_jax import sweep as sweep_lib
  from tritera_jax.experiment import Experiment

  split = args.index('--') if '--' in args else len(args)
  args, overrides = args[:split], args[split + 1 :]

  def sweep(
    file: Positional[str],
    patterns: Positional[tuple[str, ...]] = (),
    array: bool = False,
    *,
    out: Path,
  ):
    """Trains and scores a file's sweep, run by run, into OUT/runs.jsonl.

    Again, it goes on where it was. What follows ' -- ' changes fields of
    every experiment, as for `tritera train`.

    Args:
      file: experiment file with a sweep().
      patterns: of names, such as 'mini_*'; none: all.
      array: print a SLURM job array of a task for each run instead.
      out: folder for the run folders and their table.
    """
    members = {
      name: tyro.cli(
        Experiment,
        default=experiment,
        args=overrides,
        prog=f'tritera sweep {file} --',
        config=(tyro.conf.AvoidSubcommands,),
      )
      for name, experiment in sweep_lib.chosen(
        experiment_file.load_sweep(file), patterns
      ).items()
    }
    if array:
      print(sweep_lib.job_array(file, list(members), out, overrides), end='')
      return
    say = functools.partial(print, flush=True)
    failed = sweep_lib.sweep(file, members, out, overrides, say)
    if failed:
      raise ValueError(f'{len(failed)} runs failed: {", ".join(failed)}')

  tyro.cli(sweep, args=args, prog='tritera sweep')


def bench(args: list[str]):
  from tritera_jax import experiment_file
  from tritera_jax.train import bench

  if args[:1] != ['train']:
    print('usage: tritera bench train [EXPERIMENT ...] [OPTIONS]')
    raise SystemExit(0 if args[:1] in (['-h'], ['--help']) else 2)

  def train(
    experiments: Positional[tuple[str, ...]] = (),
    options: Annotated[bench.Options, BARE] = bench.Options(),
    spectra: bool = False,
    out: Path | None = None,
  ):
    """Times training steps of experiments and of their twins, turn by turn.

    Args:
      experiments: EXPERIMENT.py or EXPERIMENT.py:NAME; several.
      options: how they are timed.
      spectra: also TriLM 99M, 390M and 1.1B of experiments/spectra.py, in
        batches for one GPU.
      out: folder for train.jsonl and train.md.
    """
    named = {name: experiment_file.load(name) for name in experiments}
    if spectra:
      options, more = bench.spectra(options)
      named |= more
    if not named:
      raise ValueError('no experiment; name one, or give --spectra')
    bench.run(named, options, out, functools.partial(print, flush=True))

  tyro.cli(train, args=args[1:], prog='tritera bench train')


def goodput(args: list[str]):
  def goodput(run: Positional[Path]):
    """Where the time of a run went: what trained, waited, was lost.

    Args:
      run: run folder.
    """
    from tritera_jax.train import goodput

    print(goodput.measured(run))

  tyro.cli(goodput, args=args, prog='tritera goodput')
