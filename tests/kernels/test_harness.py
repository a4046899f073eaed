# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels without Python: a quick part of tests/kernels/harness."""

import os
from pathlib import Path
import shutil
import subprocess

import jax
import pytest

HARNESS = Path(__file__).parent / 'harness'
# A thin sweep: `make all` in the folder is thorough, with sanitizers.
COMMANDS = ('test_dot all 500', 'test_ops 20', 'test_calls 24',
            'fuzz_handlers 4000')  # fmt: skip


@pytest.mark.skipif(
  not (shutil.which('make') and shutil.which('g++')),
  reason='the harness is built by make and g++',
)
def test_kernels_drivers_and_handlers_by_themselves(tmp_path):
  programs = [command.split()[0] for command in COMMANDS]
  # Its assertions and tests cost more to optimise than they save.
  make = ['make', '-s', '-j2', f'BUILD={tmp_path}', 'OPT=-O1', 'CXX=g++']
  run(
    [
      *make,
      f'FFI={jax.ffi.include_dir()}',
      *(str(tmp_path / 'native' / program) for program in programs),
    ]
  )
  for command in COMMANDS:
    program, *arguments = command.split()
    run([str(tmp_path / 'native' / program), *arguments])


def run(command: list[str]):
  done = subprocess.run(
    command,
    cwd=HARNESS,
    env={**os.environ, 'THIN': '8'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
