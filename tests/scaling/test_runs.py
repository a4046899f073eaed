# SPDX-License-Identifier: Apache-2.0
"""Tables of runs: how they are written by several, and what is refused."""

import dataclasses
import json
import multiprocessing

import pytest

from tests.scaling.test_points import run
from tritera_jax import sweep
from tritera_jax.scaling import runs


def _write_often(folder, name: str):
  for n in range(200):
    runs.write(folder, [run(f'{name}{m}', seed=m) for m in range(1 + n % 9)])


def test_processes_that_write_one_table_leave_a_whole_one(tmp_path):
  context = multiprocessing.get_context('spawn')
  writers = [
    context.Process(target=_write_often, args=(tmp_path, name)) for name in 'ab'
  ]
  for each in writers:
    each.start()
  for each in writers:
    each.join()
  assert [each.exitcode for each in writers] == [0, 0]
  names = [row.name for row in runs.read(tmp_path)]
  assert names in ([f'{w}{m}' for m in range(2)] for w in 'ab')
  assert [path.name for path in tmp_path.iterdir()] == ['runs.jsonl']


def test_the_last_to_collect_has_the_results_of_all(tmp_path, monkeypatch):
  def finish(name: str, seed: int):
    (tmp_path / name).mkdir()
    row = json.dumps(dataclasses.asdict(run(name, seed=seed)))
    (tmp_path / name / 'result.json').write_text(row)

  def late(folder, rows):
    """Another task has its result, and its table, before this table is."""
    monkeypatch.setattr(runs, 'write', write)
    finish('b', 1)
    sweep._collect(tmp_path)
    return write(folder, rows)

  write = runs.write
  finish('a', 0)
  monkeypatch.setattr(runs, 'write', late)
  sweep._collect(tmp_path)
  assert [row.name for row in runs.read(tmp_path)] == ['a', 'b']


def test_what_nobody_said_is_not_written(tmp_path):
  runs.write(tmp_path, [run(), run('b', held_out='x-y')])
  first, second = (tmp_path / 'runs.jsonl').read_text().splitlines()
  assert 'held_out' not in {*json.loads(first)} - {'held_out_loss'}
  assert json.loads(second)['held_out'] == 'x-y'
  assert [row.held_out for row in runs.read(tmp_path)] == [None, 'x-y']


ROW = json.dumps(dataclasses.asdict(run()))


@pytest.mark.parametrize(('content', 'words'), [
  (b'', r'^no runs in .*runs\.jsonl'),
  (b' \n\n', r'^no runs in .*runs\.jsonl'),
  (b'\xff\xfe', r'runs\.jsonl is not UTF-8 at byte 0'),
  (f'{ROW}\n\n{ROW}\n'.encode(), "runs.jsonl, line 3: a second run 'a'"),
  (ROW.replace('3.0', 'NaN').encode(), 'line 1: held_out_loss=nan of a must'),
  (ROW.replace(': 7', ': "7"').encode(), 'line 1: tokens: Input should be'),
])  # fmt: skip
def test_tables_that_are_none_are_refused(tmp_path, content, words):
  (tmp_path / 'runs.jsonl').write_bytes(content)
  with pytest.raises(ValueError, match=words):
    runs.read(tmp_path)
