# SPDX-License-Identifier: Apache-2.0
"""The names of the package itself."""

import ast
import importlib
import os
from pathlib import Path
import pkgutil
import subprocess
import sys

import pytest

import tritera_jax


@pytest.mark.parametrize('name', tritera_jax.__all__)
def test_every_name_is_what_its_module_holds(name):
  module, _, there = tritera_jax._PLACES[name].partition(':')
  value = getattr(importlib.import_module(module), there or name)
  assert getattr(tritera_jax, name) is value
  assert value.__doc__ and value.__module__.startswith(module)


def test_table_type_checker_and_all_agree():
  tree = ast.parse(Path(tritera_jax.__file__).read_text())
  typed = {
    alias.asname or alias.name: (node.module, alias.name)
    for node in ast.walk(tree)
    if isinstance(node, ast.ImportFrom) and node.module != 'typing'
    for alias in node.names
  }
  table = {}
  for name, place in tritera_jax._PLACES.items():
    module, _, there = place.partition(':')
    table[name] = (module, there or name)
  assert typed == table
  assert tritera_jax.__all__ == sorted(table)


def test_no_name_is_that_of_a_submodule():
  below = {m.name for m in pkgutil.iter_modules(tritera_jax.__path__)}
  assert {'train', 'eval', 'data', 'show'} <= below
  assert not below & set(tritera_jax.__all__)


def test_what_is_not_there_is_an_attribute_error():
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = tritera_jax.nothing  # type: ignore
  assert set(tritera_jax.__all__) <= set(dir(tritera_jax))


def test_importing_the_package_imports_next_to_nothing():
  program = """
import sys
before = set(sys.modules)
import tritera_jax
dir(tritera_jax)
print(*{name.split('.')[0] for name in set(sys.modules) - before})
"""
  root = Path(tritera_jax.__file__).parents[1]
  found = subprocess.run(
    [sys.executable, '-S', '-c', program],
    env={**os.environ, 'PYTHONPATH': str(root)},
    check=True, capture_output=True, text=True,
  ).stdout.split()  # fmt: skip
  assert set(found) - set(sys.stdlib_module_names) == {'tritera_jax'}
