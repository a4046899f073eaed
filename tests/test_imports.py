# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and what importing may do."""

import ast
import importlib.util
import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / 'tritera_jax', ROOT / 'kernels' / 'tritera_kernels')

# Each part and the parts that it may import beside itself. `experiment` is
# the frozen description that everything above the model reads.
# `__init__` names all that is to be called, and imports none of it by itself.
MAY_IMPORT = {
  '__init__': {
    'checkpoint', 'data', 'eval', 'experiment', 'experiment_file',
    'generate', 'model', 'parallel', 'quantlm', 'show', 'ternary', 'train',
    'tritera_kernels',
  },
  'tritera_kernels': set(),
  'ternary': {'parallel', 'tritera_kernels'},
  'parallel': {'tritera_kernels'},
  'pictures': set(),
  'validated': set(),
  'data': {'validated'},
  'model': {'ternary', 'parallel', 'tritera_kernels'},
  'experiment': {'model', 'parallel', 'ternary', 'validated'},
  'experiment_file': {'experiment'},
  'checkpoint': {
    'experiment', 'model', 'ternary', 'parallel', 'tritera_kernels',
  },
  'train': {
    'checkpoint', 'data', 'experiment', 'experiment_file', 'model',
    'parallel', 'pictures', 'ternary', 'validated',
  },
  'generate': {
    'checkpoint', 'data', 'experiment', 'model', 'parallel', 'ternary',
    'tritera_kernels',
  },
  'eval': {
    'checkpoint', 'data', 'experiment', 'generate', 'model', 'parallel',
    'ternary', 'train', 'tritera_kernels',
  },
  'quantlm': {'checkpoint', 'data', 'experiment', 'model'},
  'interop': {
    'checkpoint', 'data', 'experiment', 'model', 'ternary', 'train',
    'tritera_kernels', 'validated',
  },
  'scaling': {'pictures', 'validated'},
  'plan': {'experiment', 'model', 'parallel', 'ternary', 'train'},
  'show': {'experiment', 'model'},
  'quickstart': {
    'checkpoint', 'data', 'eval', 'experiment_file', 'generate', 'show',
    'train',
  },
  'sweep': {
    'checkpoint', 'data', 'eval', 'experiment', 'model', 'scaling', 'train',
  },
  '__main__': {'cli'},
  'cli': {
    'checkpoint', 'data', 'eval', 'experiment', 'experiment_file',
    'generate', 'interop', 'parallel', 'plan', 'quantlm', 'quickstart',
    'scaling', 'show', 'sweep', 'train', 'tritera_kernels',
  },
}  # fmt: skip
# Modules whose import needs an extra: left out where it is not installed.
NEEDS = {'tritera_jax.eval.adapter': 'lm_eval'}
NOBODY_IMPORTS = {'experiments', 'notebooks', 'tests', 'kernels'}


def modules() -> dict[str, Path]:
  """Every module of both packages by its dotted name."""
  return {
    '.'.join(file.relative_to(source.parent).with_suffix('').parts): file
    for source in SOURCES
    for file in sorted(source.rglob('*.py'))
  }


def part(module: str) -> str:
  """The part of the project that a module belongs to."""
  package, _, rest = module.partition('.')
  return rest.split('.')[0] if package == 'tritera_jax' and rest else package


def imports(file: Path) -> set[str]:
  """Absolute names of what a file imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def test_there_is_something_to_check():
  assert len(modules()) > 30


@pytest.mark.parametrize('module', modules())
def test_directions(module):
  here = part(module)
  for name in imports(modules()[module]):
    top = name.split('.')[0]
    assert top not in NOBODY_IMPORTS, f'{module} imports {name}'
    if top in ('tritera_jax', 'tritera_kernels'):
      there = part(name)
      assert there == here or there in MAY_IMPORT[here], (
        f'{module} ({here}) may not import {name} ({there})'
      )
    if top == 'jax_triton':
      assert module.endswith('.gpu.shim'), f'{module} imports jax_triton'


def test_importing_everything_touches_no_device():
  """On a platform that does not exist, any use of a device would raise."""
  names = [
    name.removesuffix('.__init__')
    for name in modules()
    if name not in NEEDS or importlib.util.find_spec(NEEDS[name])
  ]
  program = f'import importlib\nfor n in {names}: importlib.import_module(n)'
  paths = os.pathsep.join(str(source.parent) for source in SOURCES)
  subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'JAX_PLATFORMS': 'nowhere', 'PYTHONPATH': paths},
    check=True,
  )


def test_names_that_promise_nothing_or_shadow_others():
  assert not [m for m in modules() if m.endswith(('utils', 'helpers'))]
  assert not (ROOT / 'kernels' / '__init__.py').exists()
  assert not (ROOT / 'experiments' / '__init__.py').exists()
