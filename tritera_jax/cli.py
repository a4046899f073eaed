# SPDX-License-Identifier: Apache-2.0
"""`tritera <verb>`: parses, calls the library, prints. No logic lives here.

The library is imported verb by verb, so that --help is quick.
"""

from collections.abc import Callable, Iterator
import contextlib
import difflib
import functools
import inspect
from pathlib import Path
import re
import sys
from typing import Annotated, Any, Literal

import tqdm
import tyro

Positional = tyro.conf.Positional
_BARE = tyro.conf.arg(name='')  # fields by their own names


def _with_names(function: Callable, **fixed) -> Callable:
  """`function` as tyro is to see it: arguments by name, without `fixed`."""
  # Not a wrapper of functools: tyro would look behind it.
  named: Any = lambda *args, **kwargs: function(*args, **kwargs, **fixed)
  named.__name__ = function.__name__
  named.__signature__ = inspect.Signature(
    [
      parameter.replace(
        annotation=Annotated[
          parameter.annotation, tyro.conf.arg(metavar=name.upper())
        ]
      )
      if parameter.default is parameter.empty
      else parameter
      for name, parameter in inspect.signature(function).parameters.items()
      if name not in fixed
    ]
  )
  named.__annotations__ = {
    name: parameter.annotation
    for name, parameter in named.__signature__.parameters.items()
  }
  # The lines of an argument are one paragraph, to be broken anew.
  named.__doc__ = re.sub(r'\n {6,}', ' ', function.__doc__ or '')
  return named


@contextlib.contextmanager
def _bytes_bar() -> Iterator[Callable[[int, int], None]]:
  """A function of bytes done and bytes in all; the bar comes with its call."""
  bar = None

  def show(done: int, total: int):
    nonlocal bar
    if bar is None:
      bar = tqdm.tqdm(total=total, unit='B', unit_scale=True)
    bar.update(done - bar.n)

  try:
    yield show
  finally:
    if bar is not None:
      bar.close()


def _prepare(args: list[str]):
  from tritera_jax.data import prepare

  with _bytes_bar() as progress:
    summary = tyro.cli(
      _with_names(prepare.prepare, progress=progress),
      args=args,
      prog='tritera prepare',
      config=(tyro.conf.PositionalRequiredArgs,),
    )
  print(summary)


def _resolve(verb: str, args: list[str]):
  """The experiment that `args` name, without its overrides."""
  from tritera_jax import experiment

  usage = f'usage: tritera {verb} EXPERIMENT.py[:NAME] [--section.field VALUE]'
  if not args or args[0] in ('-h', '--help'):
    print(f'{usage}\n  EXPERIMENT.py --help lists every field')
    raise SystemExit(0 if args else 2)
  return experiment.load(args[0])


def _with_overrides(verb: str, args: list[str], function: Callable):
  """Calls `function` of an experiment that `_resolve` took from `args`."""
  tyro.cli(
    function,
    args=args[1:],
    prog=f'tritera {verb} {args[0]}',
    config=(tyro.conf.AvoidSubcommands,),
  )


def _keep_compiled(run: str | Path):
  """So that what goes on does not compile again."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    folder = Path(run).absolute() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _train(args: list[str]):
  from tritera_jax.experiment import Experiment
  from tritera_jax.parallel import processes
  from tritera_jax.parallel.processes import Launch

  def train(
    experiment: Annotated[Experiment, _BARE] = _resolve('train', args),
    launch: Annotated[Launch, _BARE] = Launch(),
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
    _keep_compiled(experiment.run.folder)
    with exits.told(place.processes):
      loop.train(experiment)
    if place.process == 0:
      print(f'loss curve: {metrics.plot(experiment.run.folder)}')

  _with_overrides('train', args, train)


def _show(args: list[str]):
  from tritera_jax.experiment import Experiment

  def show(
    experiment: Annotated[Experiment, _BARE] = _resolve('show', args),
  ):
    """An experiment's size and cost.

    Args:
      experiment: as the file says, but for what is given here.
    """
    from tritera_jax import show

    print(show.describe(experiment))

  _with_overrides('show', args, show)


def _plan(args: list[str]):
  from tritera_jax.experiment import Experiment
  from tritera_jax.plan.reliability import Assumptions

  def plan(
    experiment: Annotated[Experiment, _BARE] = _resolve('plan', args),
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

  _with_overrides('plan', args, plan)


def _bench(args: list[str]):
  from tritera_jax import experiment as experiment_lib
  from tritera_jax.train import bench

  if args[:1] != ['train']:
    print('usage: tritera bench train [EXPERIMENT ...] [OPTIONS]')
    raise SystemExit(0 if args[:1] in (['-h'], ['--help']) else 2)

  def train(
    experiments: Positional[tuple[str, ...]] = (),
    options: Annotated[bench.Options, _BARE] = bench.Options(),
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
    named = {name: experiment_lib.load(name) for name in experiments}
    if spectra:
      options, more = bench.spectra(options)
      named |= more
    if not named:
      raise ValueError('no experiment; name one, or give --spectra')
    bench.run(named, options, out, functools.partial(print, flush=True))

  tyro.cli(train, args=args[1:], prog='tritera bench train')


def _eval(args: list[str]):
  from tritera_kernels.matmul import Activations

  def evaluate(
    path: Positional[Path],
    data: str | None = None,
    split: str = 'validation',
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    activations: Activations | None = None,
    baselines: bool = False,
  ):
    """Loss of a run or a packed model on a split of a dataset.

    Args:
      path: run folder or packed folder.
      data: dataset folder or bucket URL; default: the run's own.
      split: of the dataset.
      sequence_length: tokens a window; default: the model's context.
      stride: tokens scored a window; default: half a window.
      batch_size: windows at once.
      activations: of a packed model: float, bfloat16 or int8; default: its
        record's.
      baselines: also gzip, xz and a unigram model on the same text.
    """
    from tritera_jax.eval import baselines as baselines_lib
    from tritera_jax.eval import perplexity

    data = data or perplexity.default_data(path)
    print(
      perplexity.evaluate(
        path,
        data,
        split=split,
        sequence_length=sequence_length,
        stride=stride,
        batch_size=batch_size,
        activations=activations,
        progress=functools.partial(tqdm.tqdm, unit='batch', leave=False),
      )
    )
    if baselines:
      for name, bits in baselines_lib.all_baselines(data, split).items():
        print(f'{name}: {bits:.4f} bits/byte')

  tyro.cli(evaluate, args=args, prog='tritera eval')


def _pack(args: list[str]):
  from tritera_jax.checkpoint import pack
  from tritera_jax.checkpoint.packed_file import Head
  from tritera_kernels.matmul import Activations

  def run(
    run: Positional[Path],
    format: Literal['two_bit', 'base_three'] = 'two_bit',
    step: int | None = None,
    activations: Activations = 'float',
    head: Head | None = None,
  ):
    """Packs a run's ternary weights into RUN/packed/FORMAT.

    Args:
      run: run folder.
      format: two_bit or base_three.
      step: which checkpoint; default: the newest.
      activations: what the packed model is to be run with: float, bfloat16 or
        int8.
      head: int8 also rounds head and embedding; default: if activations are.
    """
    report = pack.pack(
      run, format, step=step, activations=activations, head=head
    )
    print(
      f'{report.folder}: {report.bits_per_weight:.3f} bits/weight, '
      f'{report.file_bytes:,} bytes, {report.fingerprint}'
    )

  tyro.cli(run, args=args, prog='tritera pack')


def _generate(args: list[str]):
  from tritera_kernels.fused import CacheType
  from tritera_kernels.matmul import Activations

  def generate(
    path: Positional[Path],
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    seed: int = 0,
    activations: Activations | None = None,
    cache: CacheType | None = None,
    format: Literal['two_bit', 'base_three'] | None = None,
  ):
    """Continues a prompt, or several.

    Args:
      path: run folder or packed folder.
      prompt: text to continue; may be repeated. Without it: stdin or, on a
        terminal, each line typed, until an empty one (Ctrl-C ends a text).
      new_tokens: most tokens to add.
      temperature: 0 takes the most likely token.
      top_k: sample from the k most likely tokens; 0 from all.
      top_p: sample from the most likely tokens of total probability p.
      min_p: sample from tokens at least min_p times as likely as the first.
      repetition_penalty: above 1 makes tokens already there less likely.
      stop: text that ends the continuation, such as $'\\n'; may be repeated.
      seed: of sampling.
      activations: of a packed model: float, bfloat16 or int8; default: its
        record's.
      cache: of a packed model, what keys and values are rounded to: bfloat16,
        int8 or float32 (slow); default: bfloat16.
      format: of a packed model, two_bit or base_three to repack it when it is
        read: two_bit is less work, base_three less memory.
    """
    from tritera_jax.generate import launch

    launch.set_xla_flags()
    from tritera_jax.generate import load, terminal
    from tritera_jax.generate.sampling import Sampling

    terminal.run(
      load.load(path, activations=activations, cache=cache, format=format),
      prompt,
      stdin=sys.stdin,
      write=functools.partial(print, end='', flush=True),
      new_tokens=new_tokens,
      sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
      seed=seed,
      stop=stop,
    )

  tyro.cli(generate, args=args, prog='tritera generate')


def _doctor(args: list[str]):
  def doctor(*, measure: bool = True):
    """Proves the kernels that this machine would use on golden vectors.

    Args:
      measure: time the C++ kernels beside the memory they read, too.
    """
    from tritera_kernels import doctor

    text, healthy = doctor.report(measure=measure)
    print(text)
    if not healthy:
      raise SystemExit(1)

  tyro.cli(doctor, args=args, prog='tritera doctor')


def _goodput(args: list[str]):
  def goodput(run: Positional[Path]):
    """Where the time of a run went: what trained, waited, was lost.

    Args:
      run: run folder.
    """
    from tritera_jax.train import goodput

    print(goodput.measured(run))

  tyro.cli(goodput, args=args, prog='tritera goodput')


def _dynamics(args: list[str]):
  from tritera_jax.eval.interference import Tokens
  from tritera_jax.scaling.dynamics import Curve

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
    from tritera_jax.scaling import dynamics_files, dynamics_report

    out = out or run / 'dynamics'
    bar = functools.partial(tqdm.tqdm, unit='checkpoint', leave=False)
    _keep_compiled(run)
    interference.collect(run, out, tokens, progress=bar)
    found = dynamics_files.read(out, curve)
    print(dynamics_report.text(found))
    for path in dynamics_report.write({run.name: found}, out):
      print(path)

  tyro.cli(dynamics, args=args, prog='tritera dynamics')


VERBS = {
  'prepare': (_prepare, 'text to a tokenizer and token shards'),
  'train': (_train, 'train an experiment; again: resume it'),
  'eval': (_eval, 'loss on held-out text'),
  'pack': (_pack, 'ternary weights to 2 or 1.6 bits'),
  'generate': (_generate, 'continue a prompt'),
  'goodput': (_goodput, 'where the time of a run went'),
  'dynamics': (_dynamics, 'deceleration of a loss, interference of tokens'),
  'show': (_show, "an experiment's size and cost, without running it"),
  'plan': (_plan, 'time, memory and layout of a run on another machine'),
  'bench': (_bench, 'time training steps beside their float twin'),
  'doctor': (_doctor, 'check the kernels on this machine'),
}


def _usage() -> str:
  width = max(map(len, VERBS))
  lines = [f'  {name:<{width}}  {about}' for name, (_, about) in VERBS.items()]
  return '\n'.join(
    ['usage: tritera VERB ...', '', *lines, '', 'VERB --help tells more']
  )


def main(argv: list[str] | None = None) -> int:
  """Runs one verb; the exit code: 0 done, 1 refused, 2 misused."""
  verb, *args = (sys.argv[1:] if argv is None else argv) or ['--help']
  if verb in ('-h', '--help'):
    print(_usage())
    return 0
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    print(f'tritera: no verb {verb!r}{hint}\n\n{_usage()}', file=sys.stderr)
    return 2
  try:
    VERBS[verb][0](args)
  except (ValueError, OSError, FloatingPointError) as error:
    print(f'tritera {verb}: {error}', file=sys.stderr)
    return 1
  return 0
