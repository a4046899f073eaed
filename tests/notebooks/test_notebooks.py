# SPDX-License-Identifier: Apache-2.0
"""Every notebook, executed as a reader would, on something small."""

import ast
import base64
import io
import json
import os
from pathlib import Path
import shutil

from matplotlib import image
import nbclient
import nbformat
import pytest

from tritera_kernels.cpu import library

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))

# What is put after a notebook's cell with the tag `parameters`, so that it does
# less. RUN and DATA name fixtures.
SMALLER = {
  'restore_and_talk': {
    'RUN': 'tiny_run', 'DATA': 'tiny_data', 'PROMPT': 'def ', 'NEW_TOKENS': 6,
  },
  'scaling_law': {'DRAWS': 60},
  'ternary_layer': {'RUN': 'tiny_run'},
  'where_speed_comes_from': {
    'SIZES': (256, 512), 'TOKENS': (1, 8), 'GIB': 2**-6,
  },
}  # fmt: skip
NEEDS_KERNELS = {'where_speed_comes_from'}


def smaller(stem: str, request, folder: Path) -> dict:
  """Values for the parameters of a notebook, runs and datasets copied."""
  values = dict(SMALLER.get(stem, {}))
  for name in values.keys() & {'RUN', 'DATA'}:
    # A copy: notebooks pack what they restore.
    original = request.getfixturevalue(values[name])
    values[name] = str(shutil.copytree(original, folder / name))
  return values


def parameters(notebook) -> list[int]:
  return [
    n
    for n, cell in enumerate(notebook.cells)
    if 'parameters' in cell.metadata.get('tags', [])
  ]


def assigned(source: str) -> set[str]:
  """Names that the statements of a cell bind."""
  return {
    node.id
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
  }


def pictures(cell) -> list[bytes]:
  return [
    base64.b64decode(output.data['image/png'])
    for output in cell.outputs
    if 'image/png' in output.get('data', {})
  ]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_a_text_to_read(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  assert (notebook.nbformat, len(notebook.cells) <= 15) == (4, True)
  assert notebook.cells[0].cell_type == 'markdown'
  assert notebook.cells[0].source.startswith('# ')
  assert notebook.metadata == {
    'kernelspec': {
      'display_name': 'Python 3', 'language': 'python', 'name': 'python3',
    },
    'language_info': {'name': 'python'},
  }  # fmt: skip
  for cell in notebook.cells:
    if cell.cell_type == 'code':
      assert (cell.outputs, cell.execution_count) == ([], None), (
        f'{path.name}, cell {cell.id}: clear all outputs before committing'
      )
  assert len(parameters(notebook)) >= (path.stem in SMALLER)


def one_family(folder: Path) -> str:
  """A table of a reader's: one family, binary, and no configuration twice."""
  table = (ROOT / 'experiments' / 'grid_runs.jsonl').read_text()
  rows = [json.loads(line) for line in table.splitlines()]
  file = folder / 'mine.jsonl'
  file.write_text(
    '\n'.join(
      json.dumps(row | {'family': 'binary'})
      for row in rows
      if row['family'] == 'ternary' and row['seed'] == 0
    )
  )
  return str(file)


CASES = [(path, {}) for path in NOTEBOOKS] + [
  (ROOT / 'notebooks' / 'scaling_law.ipynb', {'TABLE': one_family})
]


@pytest.mark.parametrize(('path', 'more'), CASES, ids=(
  lambda each: each.stem if isinstance(each, Path) else '_'.join(each)
))  # fmt: skip
def test_it_runs_and_shows_what_it_draws(path, more, request, tmp_path):
  if path.stem in NEEDS_KERNELS and library.why_missing() is not None:
    pytest.skip('there are no C++ kernels')
  notebook = nbformat.read(path, as_version=4)
  for n in parameters(notebook):
    values = smaller(path.stem, request, tmp_path)
    values |= {name: of(tmp_path) for name, of in more.items()}
    assert values.keys() <= assigned(notebook.cells[n].source)
    lines = [f'{name} = {value!r}' for name, value in values.items()]
    notebook.cells.insert(n + 1, nbformat.v4.new_code_cell('\n'.join(lines)))

  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'kernels')]),
    'XLA_FLAGS': '',  # a reader has one device, not eight
    'IPYTHONDIR': str(tmp_path / 'ipython'),  # and no settings of ours
  }
  nbclient.NotebookClient(
    notebook,
    timeout=60,
    resources={'metadata': {'path': str(path.parent)}},
  ).execute(env=environment)

  for cell in notebook.cells:
    if cell.cell_type != 'code':
      continue
    where = f'{path.name}, cell {cell.id}'
    for output in cell.outputs:
      assert output.get('name') != 'stderr', f'{where}: {output.text}'
    drawn = pictures(cell)
    assert len(drawn) == cell.source.count('plt.show()'), where
    assert ('plt.subplots' in cell.source) == bool(drawn), where
    for png in drawn:
      assert image.imread(io.BytesIO(png)).std() > 0.01, f'{where} is blank'
