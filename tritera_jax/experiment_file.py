# SPDX-License-Identifier: Apache-2.0
"""Experiment files: Python with `experiment()`, or `sweep()` by name."""

import difflib
import importlib.util
from pathlib import Path
import types

from tritera_jax.experiment import Experiment


def load(path: str) -> Experiment:
  """The experiment of a Python file, or `file.py:name` of its sweep.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file defines neither, or its sweep has no such name.
  """
  file, _, name = path.partition('.py:')
  file = Path(file if not name else file + '.py')
  module = load_module(file)
  if hasattr(module, 'sweep'):
    sweep = module.sweep()
    if name in sweep:
      return sweep[name]
    near = difflib.get_close_matches(name, sweep, n=3) or sorted(sweep)
    raise ValueError(
      f'{file} is a sweep{f" without {name!r}" if name else ""}; name one of '
      f'its experiments: {file}:{near[0]}, ... ({", ".join(near)})'
    )
  if not hasattr(module, 'experiment'):
    raise ValueError(f'{file} defines neither experiment() nor sweep()')
  if name:
    raise ValueError(f'{file} is one experiment, not a sweep; drop :{name}')
  return module.experiment()


def load_sweep(file: str) -> dict[str, Experiment]:
  """The experiments of a Python file's sweep, by name.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file defines no sweep.
  """
  module = load_module(Path(file))
  if not hasattr(module, 'sweep'):
    raise ValueError(f'{file} has no sweep(); it takes names to experiments')
  return module.sweep()


def load_module(file: Path) -> types.ModuleType:
  """An experiment file as a module.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if file.suffix != '.py' or not file.is_file():
    raise FileNotFoundError(
      f'no experiment file {file} (a .py file, or file.py:name)'
    )
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None and spec.loader is not None  # it ends in .py
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
