# SPDX-License-Identifier: Apache-2.0
"""What verbs share: names of arguments, experiments with overrides."""

from collections.abc import Callable, Iterator
import contextlib
import inspect
from pathlib import Path
import re
from typing import Annotated, Any

import tqdm
import tyro

BARE = tyro.conf.arg(name='')  # fields by their own names


def with_names(function: Callable, **fixed) -> Callable:
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
def bytes_bar() -> Iterator[Callable[[int, int], None]]:
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


def resolve(verb: str, args: list[str]):
  """The experiment that `args` name, without its overrides."""
  from tritera_jax import experiment_file

  usage = f'usage: tritera {verb} EXPERIMENT.py[:NAME] [--section.field VALUE]'
  if not args or args[0] in ('-h', '--help'):
    print(f'{usage}\n  EXPERIMENT.py --help lists every field')
    raise SystemExit(0 if args else 2)
  return experiment_file.load(args[0])


def with_overrides(verb: str, args: list[str], function: Callable):
  """Calls `function` of an experiment that `resolve` took from `args`."""
  tyro.cli(
    function,
    args=args[1:],
    prog=f'tritera {verb} {args[0]}',
    config=(tyro.conf.AvoidSubcommands,),
  )


def keep_compiled(run: str | Path):
  """So that what goes on does not compile again."""
  import jax

  if jax.config.jax_compilation_cache_dir is None:
    folder = Path(run).absolute() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(folder))
