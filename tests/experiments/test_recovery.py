# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
import runpy

FILE = Path(__file__).parents[2] / 'experiments' / 'recovery.py'


def test_the_mini_prints_truth_coverage_and_mulocos_laws(capsys):
  runpy.run_path(str(FILE))['main'](
    only_laws=('FloatLM',), methods=('squares',), draws=2, resamples=10
  )
  lines = capsys.readouterr().out.splitlines()
  rows = {line[:26].strip(): line[26:].split() for line in lines}
  # The paper's constants; the last by hand, for 3.3e9 and 1.2e12.
  assert rows['truth'] == ['2.170', '7.860', '0.560', '3.420', '0.530', '2.334']
  assert {
    'profile', 'bootstrap of runs', 'bootstrap of residuals', 'muloco',
    'muon', 'adamw',
  } <= set(rows)  # fmt: skip
  covered = {float(cell) for cell in rows['profile']}
  assert covered <= {0, 50, 100}
