# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
import runpy
import sys

BENCH = Path(__file__).parents[2] / 'kernels' / 'bench' / 'matmul.py'


def test_every_line_says_what_was_timed_and_how(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', [str(BENCH), '--smoke'])
  runpy.run_path(str(BENCH), run_name='__main__')
  head, *rows = map(json.loads, capsys.readouterr().out.splitlines())
  assert {'command', 'date', 'machine', 'python', 'jax', 'jaxlib'} <= set(head)
  assert [row['name'] for row in rows] == [
    'dense float32',
    'dense bfloat16',
    *(
      f'{implementation} {format} {activations}'
      for format in ('two_bit', 'base_three')
      for implementation in ('cpu_ffi', 'reference')
      for activations in ('float', 'int8')
    ),
  ]
  for row in rows:
    assert row['min_ms'] <= row['median_ms'] <= row['max_ms']
