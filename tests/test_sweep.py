# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import os
from pathlib import Path
import shutil
import subprocess

import pytest

from tritera_jax import cli, experiment_file, sweep
from tritera_jax.checkpoint import save
from tritera_jax.eval import perplexity
from tritera_jax.scaling import runs

SWEEP = """
import dataclasses
from pathlib import Path
from tests import tiny

def sweep():
  small = tiny.experiment(Path({data!r}), Path('unused'), 2)
  small = dataclasses.replace(small, mesh=type(small.mesh)())
  wide = dataclasses.replace(small.model, vocab_size=400)
  return {{
    'small': small,
    'other_tokenizer': dataclasses.replace(small, model=wide),
    'longer': tiny.with_run(small, steps=4),
  }}
"""


@pytest.fixture
def file(tiny_data, tmp_path):
  file = tmp_path / 'file.py'
  file.write_text(SWEEP.format(data=str(tiny_data)))
  return file


@pytest.fixture
def swept(made_once, file):
  """The sweep's folder; `code` in it holds what the command ended with."""

  def make(out):
    code = cli.main(
      ['sweep', str(file), 'small', '*other*', '--out', str(out), '--',
       '--run.seed', '3']
    )  # fmt: skip
    (out / 'code').write_text(str(code))

  return made_once('sweep', make)


def test_what_is_trained_stands_in_the_table(swept, tiny_data):
  (row,) = runs.read(swept)
  assert (row.name, row.family, row.seed) == ('small', 'ternary', 3)
  assert row.tokens == 2 * 8 * 32
  # By hand: q and o 48 x 48, k and v 48 x 24, gate, up, down 48 x 96; gains of
  # two norms and of 12 for q and k; the last norm.
  block = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96
  without = 2 * (block + 2 * 48 + 2 * 12) + 48
  assert row.parameters_without_embeddings == without
  assert row.parameters == without + 2 * 384 * 48
  assert row.bits == 2 * block * 1.58 + (row.parameters - 2 * block) * 16
  loss = perplexity.evaluate(swept / 'small')
  assert row.held_out_loss == pytest.approx(loss.nats_per_token)
  assert row.bits_per_byte == pytest.approx(loss.bits_per_byte)
  assert save.latest_step(swept / 'small') == 2
  # What it was scored on: of the dataset's own manifest.
  manifest = json.loads((tiny_data / 'manifest.json').read_text())
  text = ''.join(
    f'{shard["tokens"]} {shard["sha256"]}\n'
    for shard in manifest['splits']['validation']
  )
  tokens = hashlib.sha256(text.encode()).hexdigest()
  assert row.held_out == f'{manifest["tokenizer"][:16]}-{tokens[:16]}'


def test_one_that_fails_is_named_and_does_not_stop_the_others(swept):
  assert (swept / 'code').read_text() == '1'
  assert not (swept / 'other_tokenizer' / 'result.json').exists()


def test_again_it_runs_nothing_that_is_there(file, swept, tmp_path, capsys):
  out = shutil.copytree(swept, tmp_path / 'out')
  result = out / 'small' / 'result.json'
  before = result.stat().st_mtime_ns
  (out / 'runs.jsonl').unlink()
  call = ['sweep', str(file), 'small', '--out', str(out)]
  assert cli.main([*call, '--', '--run.seed', '3']) == 0
  assert result.stat().st_mtime_ns == before
  assert len(runs.read(out)) == 1
  # The same name, but not the same experiment: nothing is mixed up.
  assert cli.main(call) == 1
  assert 'run.seed: 3 there, 0 here' in capsys.readouterr().err


def test_a_pattern_that_fits_nothing(file, capsys):
  assert cli.main(['sweep', str(file), 'smal', '--out', 'unused']) == 1
  assert "nothing fits 'smal'" in capsys.readouterr().err


def test_of_many_names_a_few_are_told(file):
  (one, *_) = experiment_file.load_sweep(str(file)).values()
  with pytest.raises(ValueError, match='there are 84 names: n0, n1, .*, ...$'):
    sweep.chosen({f'n{n}': one for n in range(84)}, ['m*'])


def test_a_job_array_without_overrides_has_no_separator():
  script = sweep.job_array('f.py', ['a'], Path('out'), [])
  assert '--out out || code=$?' in script


def test_a_job_array_has_a_task_for_each(file, tmp_path, capsys):
  cli.main(['sweep', str(file), '--array', '--out', 'o u t', '--',
            '--data.path', 'my data', '--run.seed', '3'])  # fmt: skip
  script = capsys.readouterr().out
  assert '#SBATCH --array=0-2\n' in script
  for name, body in (
    ('srun', 'printf "%s\\n" "$@"; exit 75'),
    ('scontrol', 'echo "$@"'),
  ):
    (tmp_path / name).write_text(f'#!/bin/bash\n{body}\n')
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(
    ['bash', '-c', script],
    env={
      'PATH': f'{tmp_path}:{os.environ["PATH"]}',
      'SLURM_ARRAY_TASK_ID': '2', 'SLURM_JOB_ID': '47',
    },
    text=True,
    capture_output=True,
  )  # fmt: skip
  assert done.returncode == 75
  assert done.stdout.splitlines() == [
    'tritera', 'sweep', str(file), 'longer', '--out', 'o u t', '--',
    '--data.path', 'my data', '--run.seed', '3', 'requeue 47',
  ]  # fmt: skip
