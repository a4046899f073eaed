# SPDX-License-Identifier: Apache-2.0
"""A table drawn from the papers' laws, and what the report says of it.

Losses are Spectra 1.1's laws of TriLM and FloatLM at five of
Spectra's sizes on 20e9 to 150e9 tokens, times exp(0.0005 z) with z standard
normal; FLOPs are 6 for each weight that multiplies. Three seeds at one cell of
each family. Two binary runs allow no law.
"""

import dataclasses
import json
import re

import numpy as np
import pytest

from tritera_jax import cli
from tritera_jax.scaling import laws, plan, runs
from tritera_jax.scaling.report import analysis as analysis_lib
from tritera_jax.scaling.report import publish, text
from tritera_jax.scaling.report.analysis import Options
from tritera_jax.scaling.runs import Run

# Spectra, Table 3: hidden, GLU, layers; 50277 tokens.
SHAPES = (
  (512, 1280, 16),
  (768, 2048, 16),
  (1024, 2560, 24),
  (1280, 3072, 24),
  (1792, 5120, 24),
)
TRUTH = {
  'ternary': laws.TRILM_SPECTRA_1_1,
  'float': laws.FLOATLM_SPECTRA_1_1,
}


def table() -> list[Run]:
  rng = np.random.default_rng(5)
  rows = []
  for family, law in [*TRUTH.items(), ('binary', TRUTH['ternary'])]:
    for h, glu, layers in SHAPES[: 1 if family == 'binary' else 5]:
      body, head = layers * (4 * h * h + 3 * h * glu), 50277 * h
      for D in (20e9, 40e9, 80e9, 150e9)[: 2 if family == 'binary' else 4]:
        seeds = 3 if (h, D, family != 'binary') == (768, 40e9, True) else 1
        for seed in range(seeds):
          loss = float(law(body, D) * np.exp(0.0005 * rng.standard_normal()))
          rows.append(
            Run(
              f'{family}_{h}_{D:.0f}_{seed}', family, body + 2 * head, body,
              1.0, int(D), 6.0 * (body + head) * D, loss, 1.0, seed, 1.0,
            )
          )  # fmt: skip
  return rows


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """The folder of the report and what it was made of."""
  folder = tmp_path_factory.mktemp('law')
  runs.write(folder, table())
  out = folder / 'new' / 'report'
  return out, publish.write([folder], out, Options(draws=60))


@pytest.fixture
def constants(written):
  return json.loads((written[0] / 'constants.json').read_text())


def test_every_picture_is_there_and_shown(written):
  out, _ = written
  shown = re.findall(r'\]\((.*?)\)', (out / 'report.md').read_text())
  assert len(shown) == 5
  for name in shown:
    assert (out / name).stat().st_size > 20_000
    svg = (out / name).with_suffix('.svg').read_text()
    assert '<text' in svg and 'tokens D' in svg + 'tokens D' * (
      name in ('parameters.png', 'families.png')
    )
  assert sorted(path.name for path in out.parent.iterdir()) == ['report']


def test_constants_come_back_in_the_units_of_their_names(constants):
  for family, law in TRUTH.items():
    found = constants['laws']['N_without_embeddings'][family]
    for truth, interval in zip(
      law.constants(1e6, 1e9).values(), found.values(), strict=True
    ):
      assert interval['estimate'] == pytest.approx(truth, rel=0.1)
      assert interval['low'] < interval['estimate'] < interval['high']
      assert interval['level'] == 0.9
  assert list(constants['laws']['N_all']['ternary']) == [
    'E_nats_per_token',
    'A_nats_per_token_for_N_in_millions',
    'alpha_of_N',
    'B_nats_per_token_for_D_in_billions',
    'beta_of_D',
  ]


def test_both_readings_are_told_and_where_they_disagree(written, constants):
  text = (written[0] / 'report.md').read_text()
  assert (
    '* **ternary**: by exponents, data; by gains at the largest run, '
    'parameters. They disagree.'
  ) in text
  said = constants['readings_at_the_largest_run']['ternary']
  found = said['parameters_exponent']['estimate']
  assert found == pytest.approx(0.717, abs=0.02)
  assert said['share_for_parameters'] == 1.0


def test_what_lies_beyond_the_runs_is_marked(written, constants):
  far = constants['plans'][2]
  assert far['for'] == '100 times that'
  law = TRUTH['ternary']
  flops = far['budget']['training_flops']
  power = law.beta / (law.alpha + law.beta)
  for choice in far['best_first']:
    assert choice['beyond'] > 5
    if choice['family'] == 'ternary':
      # Hoffmann et al., eq. 4, with C = 6 N D: the head is little there.
      G = (law.alpha * law.A / (law.beta * law.B)) ** (power / law.beta)
      expected = G * (flops / 6) ** power
      found = choice['parameters']['estimate']
      assert found == pytest.approx(expected, rel=0.15)
  text = (written[0] / 'report.md').read_text()
  assert f'| {far["best_first"][0]["beyond"]:.3g} x |' in text


def test_noise_and_refusals_are_told(written, constants):
  # Of 0.05 %, by four degrees of freedom.
  noise = constants['seed_noise_of_log_loss']
  assert noise['degrees'] == 4 and 1.5e-4 < noise['relative'] < 1e-3
  assert '2 runs for a law of 5 constants' in constants['refused']['binary']
  said = (written[0] / 'report.md').read_text()
  assert 'Not fitted: binary.' in said
  assert '## In short\n\n* No law of binary: 2 runs for a law of 5' in said
  assert 'With two families gamma is one free number' in said


def test_the_order_and_the_files_of_rows_change_nothing(
  written, constants, tmp_path, monkeypatch
):
  monkeypatch.setattr(publish, '_figures', lambda _: [])
  rows = [table()[n] for n in np.random.default_rng(1).permutation(46)]
  for name, part in (('a', rows[:20]), ('b', rows[20:])):
    (tmp_path / name).mkdir()
    runs.write(tmp_path / name, part)
  places = [tmp_path / 'a', tmp_path / 'b' / 'runs.jsonl']
  analysis = publish.write(places, tmp_path / 'report', Options(draws=60))
  assert [run.name for run in analysis.runs] != [run.name for run in rows]
  again = json.loads((tmp_path / 'report' / 'constants.json').read_text())
  assert again == constants


def test_families_are_drawn_independently():
  """The same runs under another family: one seed would draw them alike."""
  mine = [run for run in table() if run.family == 'ternary']
  twins = [
    dataclasses.replace(run, name=f'twin_{run.name}', family='float')
    for run in mine
  ]
  found = analysis_lib.analyse(mine + twins, Options(draws=60))
  ternary, floats = (
    [law.alpha for law in found.families[name].draws]
    for name in ('ternary', 'float')
  )
  assert abs(np.corrcoef(ternary, floats)[0, 1]) < 0.5


def test_a_report_is_replaced_whole_and_nothing_else_is(
  written, tmp_path, monkeypatch
):
  _, analysis = written
  monkeypatch.setattr(publish.analysis_lib, 'analyse', lambda *_: analysis)
  monkeypatch.setattr(publish, '_figures', lambda _: [])
  runs.write(tmp_path, table()[:1])
  out = tmp_path / 'report'
  publish.write([tmp_path], out)
  (out / 'stale.png').write_text('of an older report')

  def breaks(*_):
    raise OSError('no space left')

  with monkeypatch.context() as patch:
    patch.setattr(publish.text, 'report', breaks)
    with pytest.raises(OSError, match='no space'):
      publish.write([tmp_path], out)
  assert (out / 'stale.png').exists() and (out / 'report.md').exists()
  publish.write([tmp_path], out)
  names = sorted(path.name for path in tmp_path.rglob('*'))
  assert names == ['constants.json', 'report', 'report.md', 'runs.jsonl']

  mine = tmp_path / 'mine'
  mine.mkdir()
  (mine / 'constants.json').write_text('{"pi": 3}')
  with pytest.raises(FileExistsError, match='is no report of ours: name ano'):
    publish.write([tmp_path], mine)
  assert (mine / 'constants.json').read_text() == '{"pi": 3}'


def test_the_loss_is_told_and_what_another_says():
  rows = [run for run in table() if run.family != 'binary']
  found = analysis_lib.analyse(rows, Options(delta=2e-5, draws=20))
  for family, law in TRUTH.items():
    alpha = found.by_squares[family]['alpha']
    assert alpha.estimate == pytest.approx(law.alpha, rel=0.1)
  said = text.report(found, 'f' * 64)
  assert "by Huber's loss with delta = 2e-05." in said
  assert "far above Huber's delta = 2e-05" in said
  assert said.count('By least squares they cross at') == 1  # at equal bytes
  # Of experiments/recovery.py.
  assert 'the former held 90.5 to 93 % and the latter 94.5 to 97 %' in said


def test_resampled_residuals_are_warned_of(written):
  _, analysis = written
  narrow = Options(resample='residuals')
  said = text.report(dataclasses.replace(analysis, options=narrow), 'f' * 64)
  assert '80.5 to 87.5 %' in said and 'Beware: resample=residuals' in said
  assert not Options(resample='residuals', delta=float('inf')).warning


@pytest.mark.parametrize(('fields', 'message'), [
  ({'draws': 0}, 'draws=0 must be at least 20'),
  ({'draws': 19}, 'draws=19 must be'),
  ({'seed': -1}, 'seed=-1 must be >= 0'),
  ({'delta': -1.0}, 'delta=-1.0 must be > 0; inf is least squares$'),
])  # fmt: skip
def test_options_without_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Options(**fields)


def test_tables_that_allow_no_law_are_refused_in_words(tmp_path, capsys):
  runs.write(tmp_path, table()[:4])
  out = tmp_path / 'report'
  command = [
    'scaling', str(tmp_path), '--out', str(out), '--counted', 'all',
    '--serving.ternary-bits', '2', '--budget.gpu-days', '1',
    '--budget.gpu-flops-per-second', '1e15', '--budget.mfu', '0.4',
  ]  # fmt: skip
  assert cli.main(command) == 1
  error = capsys.readouterr().err
  assert error.startswith('tritera scaling: no law can be fitted: ternary: 4 ')
  assert not out.exists()
  with pytest.raises(SystemExit, match='2'):
    cli.main(['scaling', '--out', str(out)])
  assert 'usage: tritera scaling RUNS' in capsys.readouterr().err
  command = ['scaling', str(tmp_path), '--out', str(out)]
  with pytest.raises(SystemExit, match='2'):
    cli.main([*command, '--budget.served-bytes', '9'])
  assert 'N or D has no bound' in capsys.readouterr().err


def test_one_family_alone_has_no_picture_of_two(tmp_path):
  runs.write(tmp_path, [run for run in table() if run.family == 'ternary'])
  out = tmp_path / 'report'
  publish.write([tmp_path], out, Options(draws=20))
  said = (out / 'report.md').read_text()
  assert 'nothing to compare' in said and 'gamma is one' not in said
  assert len(list(out.glob('*.png'))) == len(re.findall(r'!\[', said)) == 4


def test_a_budget_too_small_is_a_line_of_the_plan():
  rows = [run for run in table() if run.family != 'binary']
  budget = plan.Budget(tokens=1e9, served_bytes=0.1)
  found = analysis_lib.analyse(rows, Options(draws=20), budget=budget)
  said = text.report(found, 'f' * 64)
  assert '(tokens 1e+09, served_bytes 0.1): no ternary model is so ' in said
  refused = publish.constants(found, 'f' * 64)['plans'][-1]['refused']
  assert refused.endswith('no float model is so small as served_bytes=0.1')
