# SPDX-License-Identifier: Apache-2.0
import io
from pathlib import Path

import pytest
import tqdm

from tritera_jax import cli

SPECTRA = 'experiments/spectra.py'


def run(capsys, *arguments):
  code = cli.main([str(argument) for argument in arguments])
  captured = capsys.readouterr()
  return code, captured.out, captured.err


def test_without_a_verb_the_verbs_are_listed(capsys):
  code, out, _ = run(capsys)
  assert code == 0
  for verb in cli.VERBS:
    assert f'\n  {verb} ' in out


def test_a_wrong_verb_is_answered_with_the_nearest(capsys):
  code, _, err = run(capsys, 'trian')
  assert code == 2 and 'did you mean train?' in err


@pytest.mark.parametrize('verb', cli.VERBS)
def test_every_verb_has_help(capsys, verb):
  with pytest.raises(SystemExit) as stop:
    cli.main([verb, '--help'])
  assert stop.value.code == 0
  assert 'usage' in capsys.readouterr().out.lower()


def test_overrides_are_typed_and_a_wrong_one_names_the_nearest(capsys):
  code, out, _ = run(
    capsys, 'show', f'{SPECTRA}:trilm_99m', '--model.layers', 20
  )
  assert code == 0 and '20 layers' in out
  for wrong, hint in (
    (('--model.layer', '20'), '--model.layers'),
    (('--model.layers', 'many'), 'invalid|integer|int'),
  ):
    with pytest.raises(SystemExit):
      cli.main(['show', f'{SPECTRA}:trilm_99m', *wrong])
    err = capsys.readouterr().err
    assert any(part in err for part in hint.split('|'))


def test_a_refusal_is_one_line_and_exit_code_one(capsys, tmp_path):
  code, out, err = run(capsys, 'pack', tmp_path)
  assert (code, out) == (1, '')
  assert err == (
    f'tritera pack: {tmp_path} is not a run folder: it has no experiment.json\n'
  )


@pytest.mark.parametrize(
  'arguments', [('eval', '--text', 'README.md'), ('generate', '--prompt', 'x')]
)
@pytest.mark.parametrize('path', ['nowhere', 'hf://an/other', 'model.gguf'])
def test_what_is_neither_run_nor_packed_is_told_so(
  capsys, tmp_path, arguments, path
):
  if path == 'model.gguf':
    path = tmp_path / path
    path.write_bytes(b'GGUF')
  verb, *rest = arguments
  code, out, err = run(capsys, verb, path, *rest)
  assert (code, out) == (1, '')
  assert err.startswith(f'tritera {verb}: no run or packed folder at ')


@pytest.mark.parametrize('to', [('--to', 'hf'), ('--to=hf',)])
def test_each_kind_of_export_has_help(capsys, to):
  with pytest.raises(SystemExit):
    cli.main(['export', *to, '--help'])
  assert '--dtype' in capsys.readouterr().out


def test_eval_pack_generate_and_doctor(
  capsys, monkeypatch, tiny_data, tiny_run
):
  code, out, _ = run(capsys, 'eval', tiny_run, '--baselines')
  assert code == 0 and 'bits/byte' in out and 'gzip -9' in out
  code, out, _ = run(
    capsys, 'eval', tiny_run / 'packed' / 'two_bit', '--data', tiny_data,
    '--activations', 'int8',
  )  # fmt: skip
  assert code == 0 and 'nats/token' in out
  code, out, _ = run(
    capsys, 'pack', tiny_run, '--format', 'base_three', '--head', 'float'
  )
  assert code == 0 and 'bits/weight' in out and 'trits1:' in out
  code, out, _ = run(
    capsys, 'generate', tiny_run, '--prompt', 'def ', '--new-tokens', 4
  )
  assert code == 0 and out.startswith('def ')
  one = out
  code, out, _ = run(
    capsys, 'generate', tiny_run, '--prompt', 'def ', '--prompt', 'x',
    '--new-tokens', 4,
  )  # fmt: skip
  assert code == 0 and out.startswith(one) and out[len(one)] == 'x'
  code, out, _ = run(
    capsys, 'generate', tiny_run, '--prompt', 'def ', '--new-tokens', 4,
    '--stop', one[5:-1], '--stop', 'never', '--min-p', 0.1,
  )  # fmt: skip
  body = one[4:-1]
  assert (code, out) == (0, f'def {body[: body.index(one[5:-1])]}\n')
  code, out, err = run(
    capsys, 'generate', tiny_run, '--prompt', 'x', '--stop', ''
  )
  assert (code, out) == (1, '') and 'has an empty string' in err
  code, _, err = run(
    capsys, 'generate', tiny_run, '--prompt', 'x', '--repetition-penalty', 0
  )
  assert code == 1 and 'repetition_penalty=0.0 must be > 0' in err
  monkeypatch.setattr('sys.stdin', io.StringIO('def '))
  code, out, _ = run(capsys, 'generate', tiny_run, '--new-tokens', 4)
  assert (code, out) == (0, one)
  code, out, _ = run(capsys, 'doctor', '--no-measure')
  assert code == 0 and 'reference' in out


def test_prepare_prints_what_it_made(capsys, tmp_path):
  command = (
    'prepare', 'tritera_jax/data', tmp_path / 'data',
    '--vocab-size', 300, '--holdout', 0.4,
  )  # fmt: skip
  code, out, err = run(capsys, *command)
  assert code == 0 and 'train' in out and 'bytes a token' in out
  size = sum(
    file.stat().st_size for file in Path('tritera_jax/data').rglob('*.*')
    if '__pycache__' not in file.parts
  )  # fmt: skip
  shown = tqdm.tqdm.format_sizeof(size)
  assert '100%' in err and f'{shown}/{shown}' in err
  # There is no bar where there is nothing to do.
  assert run(capsys, *command)[::2] == (0, '')
  with pytest.raises(SystemExit):
    cli.main(['prepare', '--help'])
  help_text = capsys.readouterr().out
  assert 'prepare [-h] [OPTIONS] CORPUS OUT' in help_text
  assert 'progress' not in help_text
