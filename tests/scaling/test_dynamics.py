# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path
import zipfile

import numpy as np
import pytest

from tritera_jax import experiment_file
from tritera_jax.scaling.dynamics import (
  deceleration,
  files,
  interference,
  report,
)
from tritera_jax.scaling.dynamics.deceleration import (
  Curve,
  Deceleration,
  NoBreakError,
)

FOLDER = Path(__file__).parents[2] / 'experiments'
PAPER = experiment_file.load_module(FOLDER / 'dynamics.py').PAPER


def kept(steps):
  every = np.arange(1, steps + 1)
  return deceleration.smoothed(every, np.ones(steps), Curve())[0]


@pytest.mark.parametrize('name', PAPER)
def test_the_published_laws_are_recovered(name):
  parameters, T = PAPER[name][:5], PAPER[name][-1]
  law = Deceleration(*parameters)
  steps = kept(T)
  got = deceleration.fit_smoothed(steps, law.loss(steps))
  found = (got.b, got.c0, got.c1, got.log_d1, got.f1)
  assert found == pytest.approx(parameters, rel=1e-3)
  assert got.rsle < 1e-5 < 0.01 < got.rsle_line
  assert got.steps == T


@pytest.mark.parametrize('name', PAPER)
def test_what_the_paper_derives_of_its_laws(name):
  """To within what rounding the parameters to two places leaves open."""
  b, c0, c1, log_d1, f1, L_d, t_d, r_d, L_hat, _, T = PAPER[name]
  law = Deceleration(b, c0, c1, log_d1, f1)
  assert law.t_d == pytest.approx(t_d, rel=0.0051)
  assert law.r_d == pytest.approx(r_d, abs=0.0105)
  open_L_d = 0.0051 * (1 / b + log_d1 + c0)
  assert math.log(law.L_d / L_d) == pytest.approx(0, abs=open_L_d + 0.002)
  # The table's own L_d, t_d and r_d give its Lhat_T to the digit.
  exact = Deceleration(L_d, 0.0, r_d, math.log(t_d), f1)
  open_hat = 0.0051 + 3 * 0.00051 * math.log(T / t_d)
  assert exact.extrapolated(T) == pytest.approx(L_hat, abs=0.0051 + open_hat)


def test_a_law_to_all_digits_and_what_its_authors_derive_of_it():
  """The 14M row as their notebook prints it, which takes t_d's whole steps."""
  law = Deceleration(
    18.42228122996291, 0.1745419821376034, -0.16202506252441196,
    8.678862921592685, 0.20302157817235242,
  )  # fmt: skip
  assert int(law.t_d) == 5877
  assert law.L_d == pytest.approx(4.050116377871212, rel=1e-4)
  assert law.r_d == pytest.approx(0.012516919613191457, rel=1e-9)
  assert law.extrapolated(262153) == pytest.approx(3.8620874746898592, rel=1e-4)
  # The first and the last point of its published curve.
  assert law.loss(110) == pytest.approx(8.110258229461262)
  last = law.loss(np.array([262153.0]))
  assert last == pytest.approx(3.8620491693021592, rel=1e-4)


def test_the_steps_that_are_kept():
  steps = kept(262153)
  by_hand = [
    *range(110, 1000, 10), *range(1000, 10_000, 100),
    *range(10_000, 262_153, 1000), 262_153,
  ]  # fmt: skip
  assert steps.tolist() == by_hand
  every = np.arange(30)
  early, _ = deceleration.smoothed(every, np.ones(30), Curve(after=0))
  assert early.tolist() == every[1:].tolist()
  few, _ = deceleration.smoothed(
    np.arange(5000), np.ones(5000), Curve(spacing=10, after=4900)
  )
  assert few.tolist() == [*range(4910, 5000, 10), 4999]


def test_smoothing_is_the_mean_since_a_sixth_of_the_steps():
  rng = np.random.default_rng(0)
  steps = np.flatnonzero(rng.random(500) < 0.7)  # some are missing
  losses = rng.uniform(1, 9, len(steps))
  loss_of = dict(zip(steps.tolist(), losses, strict=True))
  got = deceleration.smoothed(steps, losses, Curve(after=0))
  for step, mean in zip(*got, strict=True):
    since = range(math.floor(step / 1.2), step + 1)
    want = np.mean([loss_of[s] for s in since if s in loss_of])
    assert mean == pytest.approx(want)


def test_errors_are_those_of_repeated_fits():
  law = Deceleration(20.0, 0.2, -0.17, math.log(3000), 0.3)
  steps = kept(60_000)
  rng = np.random.default_rng(0)
  laws = [
    deceleration.fit_smoothed(
      steps, law.loss(steps) * np.exp(0.01 * rng.normal(size=len(steps)))
    )
    for _ in range(60)
  ]
  for name in ('b', 'c0', 'c1', 'log_d1', 'f1', 't_d', 'L_d', 'r_d'):
    found = [getattr(one, name) for one in laws]
    stated = np.mean([one.errors[name] for one in laws])
    assert np.std(found) == pytest.approx(stated, rel=0.35)
    truth = getattr(law, name)
    assert np.mean(found) == pytest.approx(
      truth, abs=4 * stated / math.sqrt(60)
    )
  assert all(one.rsle == pytest.approx(0.01, rel=0.3) for one in laws)


def test_curves_without_a_deceleration_are_refused():
  steps = np.arange(1, 5001)
  line = 20 * steps**-0.2
  with pytest.raises(NoBreakError, match='from 110 to 4000: too few to show'):
    deceleration.fit(steps[:4000], line[:4000])
  with pytest.raises(NoBreakError, match='no steps kept after curve.after=10'):
    deceleration.fit(steps[:100], line[:100])
  short = Curve(guess=1000)
  x = kept(5000)
  for seed in range(10):
    noise = np.random.default_rng(seed).normal(0, 0.01, len(x))
    with pytest.raises(NoBreakError):
      deceleration.fit_smoothed(x, 20 * x**-0.2 * np.exp(noise), short)
  faster = Deceleration(20.0, 0.1, 0.2, math.log(1000), 0.3).loss(steps)
  with pytest.raises(NoBreakError, match='falls faster after step'):
    deceleration.fit(steps, faster, short)
  with pytest.raises(ValueError, match='has no logarithm'):
    deceleration.fit(steps, np.where(steps == 7, np.nan, line), short)
  with pytest.raises(ValueError, match='steps must grow'):
    deceleration.fit(steps[::-1], line, short)
  with pytest.raises(ValueError, match='curve.ratio=1.0 must be > 1'):
    Curve(ratio=1.0)


def test_interference_and_what_is_left_of_the_magnitude():
  assert interference.interference([1.0, 2.0, 3.0]) == (0.0, 2.0, 2.0)
  assert interference.interference([-1.0, -3.0]) == (0.0, 2.0, -2.0)
  assert interference.interference([-2.0, 2.0]) == (1.0, 2.0, 0.0)
  assert math.isnan(interference.interference([0.0, 0.0]).D)
  rng = np.random.default_rng(0)
  for _ in range(20):
    changes = rng.normal(0.3, 1, rng.integers(2, 99))
    D, M, change = interference.interference(changes)
    assert 0 <= D <= 1
    assert abs(change) == pytest.approx(M * (1 - D))


def test_gradients_by_coordinate_and_on_an_update():
  rng = np.random.default_rng(0)
  g = rng.normal(0.1, 1, (40, 300))
  g[:, 7] = 0
  update = rng.normal(size=300)
  sums, absolutes = g.sum(0), np.abs(g).sum(0)
  D, histogram = interference.gradient_interference(sums, absolutes)
  each = [
    1 - abs(sum(g[:, j])) / sum(abs(g[:, j])) for j in range(300) if j != 7
  ]
  assert pytest.approx(np.mean(each)) == D
  assert histogram.sum() == 299 and len(histogram) == 100
  assert histogram[10] == sum(0.1 <= 1 - x < 0.11 for x in each)

  p = g * update
  got = interference.projections(sums, absolutes, update, p.sum(1))
  all_of_it = np.abs(p).sum()
  assert pytest.approx(np.abs(p.sum(0)).sum() / all_of_it) == got.Cg
  assert pytest.approx(np.abs(p.sum(1)).sum() / all_of_it) == got.Cug
  assert pytest.approx(abs(p.sum()) / np.abs(p.sum(0)).sum()) == got.CuG
  assert pytest.approx(abs(p.sum()) / np.abs(p.sum(1)).sum()) == got.Ci
  assert got.Ci == pytest.approx(got.Cg * got.CuG / got.Cug)
  assert got.Ci == pytest.approx(1 - interference.interference(p.sum(1)).D)
  still = interference.projections(sums, absolutes, 0 * update, 0 * p.sum(1))
  assert all(map(math.isnan, still))


def folder_of(place, **changed):
  """A run of 6,000 steps whose loss decelerates at 1,000."""
  rng = np.random.default_rng(0)
  steps = np.arange(1, 6001)
  law = Deceleration(12.0, 0.15, -0.12, math.log(1000), 0.2)
  training = {
    'family': np.array('ternary'), 'steps': steps, 'losses': law.loss(steps),
  }  # fmt: skip
  place.mkdir()
  np.savez(place / 'training.npz', **training | changed.get('training', {}))
  for step in (64, 128):
    g = rng.normal(0.1, 1, (16, 50)).astype(np.float32)
    update = rng.normal(0, 1e-3, 50).astype(np.float32)
    losses = rng.uniform(2, 4, 32).astype(np.float32)
    arrays = {
      'made_of': np.array('by hand'),
      'step': np.int64(step),
      'losses': losses,
      'losses_after': losses + np.float32(0.125) * np.sign(losses - 3),
      'predicted': g @ update,
      'gradient_sums': g.sum(0),
      'gradient_absolutes': np.abs(g).sum(0),
      'update': update,
    }
    if step == 128:
      arrays |= changed.get('step', {})
    np.savez(place / f'step_{step}.npz', **arrays)
  return place


def test_files_are_read_and_reported(tmp_path):
  folder = folder_of(tmp_path / 'run')
  run = files.read(folder, Curve(guess=800))
  assert run.family == 'ternary'
  # Smoothing delays the break a little.
  assert run.deceleration.t_d == pytest.approx(1100, rel=0.1)
  first, last = run.checkpoints
  there = {s: np.load(folder / f'step_{s}.npz') for s in (64, 128)}
  change = there[128]['losses'] - there[64]['losses']
  assert pytest.approx(np.abs(change).mean()) == first.doubling.M
  assert last.doubling is None
  assert pytest.approx(0.125, rel=1e-5) == first.one_step.M
  signs = np.sign(there[64]['losses'] - 3)
  assert pytest.approx(1 - abs(signs.mean()), abs=1e-5) == first.one_step.D
  after = there[64]['losses_after'] - there[64]['losses']
  want = np.corrcoef(there[64]['predicted'], after[:16])[0, 1]
  assert first.correlation == pytest.approx(want, rel=1e-4)

  written = report.write({'a': run, 'b': run}, tmp_path / 'out')
  assert [file.name for file in written] == [
    'dynamics.json', 'deceleration.png', 'deceleration.svg',
    'interference.png', 'interference.svg',
  ]  # fmt: skip
  record = json.loads(written[0].read_text())['a']
  assert record['deceleration']['t_d'] == run.deceleration.t_d
  assert record['checkpoints'][0]['one_step']['D'] == first.one_step.D
  assert f'{first.gradient_D:.3f}' in report.text(run)


def test_a_run_too_short_is_reported_without_a_law(tmp_path):
  run = files.read(folder_of(tmp_path / 'run'), Curve(guess=7000))
  assert run.deceleration is None
  assert 'none: 140 of the steps' in report.text(run)
  written = report.write({'a': run}, tmp_path / 'out')
  assert json.loads(written[0].read_text())['a']['deceleration'] is None


def test_without_a_step_kept_there_is_no_curve_to_draw(tmp_path):
  run = files.read(folder_of(tmp_path / 'run'), Curve(after=9000))
  assert 'none: no steps kept after curve.after=9000:' in report.text(run)
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'deceleration.png').write_text('of another call')
  report.write({'a': run}, out)
  assert sorted(path.name for path in out.iterdir()) == [
    'dynamics.json', 'interference.png', 'interference.svg',
  ]  # fmt: skip


def test_an_update_of_nothing_says_nothing(tmp_path):
  """As with a learning rate of 0; losses may differ by rounding."""
  still = {
    n: np.zeros(k, np.float32) for n, k in (('update', 50), ('predicted', 16))
  }
  run = files.read(folder_of(tmp_path / 'run', step=still), Curve(guess=800))
  (last,) = run.checkpoints[-1:]
  assert last.one_step is None and np.isnan(last.correlation)
  report.write({'a': run}, tmp_path / 'out')
  assert 'nan' not in report.text(run)


NAN, ONES = np.full(32, np.nan, np.float32), np.ones(20, np.float32)
BAD = {
  'other length': ({'step': {'losses_after': NAN[:31]}}, 'losses_after is'),
  'other dtype': ({'step': {'update': np.zeros(50)}}, 'update is float64'),
  'not finite': ({'step': {'losses': NAN}}, 'losses holds a number that is'),
  'other step': ({'step': {'step': np.int64(7)}}, 'holds step 7'),
  'objects': ({'step': {'made_of': np.array([{}])}}, 'made_of is object'),
  'one too many': ({'step': {'more': np.zeros(1)}}, "holds .*'more.npy'"),
  'no family': ({'training': {'family': np.array('x')}}, "family='x' is none"),
  'fewer tokens': (
    {'step': {'losses': ONES, 'losses_after': ONES}},
    'has losses of 20 tokens, that of step 64 of 32',
  ),
  'not growing': (
    {'training': {'steps': np.arange(6000)[::-1]}}, 'npz: steps must grow',
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', BAD)
def test_files_that_are_not_what_they_should_be_are_named(name, tmp_path):
  changed, words = BAD[name]
  folder = folder_of(tmp_path / 'run', **changed)
  with pytest.raises(ValueError, match=words) as error:
    files.read(folder, Curve(guess=800))
  assert str(folder) in str(error.value)


def test_damaged_files_and_those_that_claim_too_much(tmp_path):
  folder = folder_of(tmp_path / 'run')
  file = folder / 'step_128.npz'
  whole = file.read_bytes()

  def refused(data, words):
    file.write_bytes(data)
    with pytest.raises(ValueError, match=words):
      files.read(folder, Curve(guess=800))

  refused(whole[: len(whole) // 2], 'step_128.npz is damaged')
  # A terabyte, in a file of some kilobytes.
  file.write_bytes(whole)
  with zipfile.ZipFile(file) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  members['update.npy'] = members['update.npy'].replace(
    b'(50,), }          ', b'(250000000000,), }'
  )
  with zipfile.ZipFile(file, 'w') as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  refused(file.read_bytes(), 'update is float32.250000000000. in 200 bytes')
  arrays = dict(np.load(folder / 'step_64.npz'))
  np.savez_compressed(file, **arrays)
  refused(file.read_bytes(), 'is not what `tritera dynamics` writes')
  with pytest.raises(
    FileNotFoundError, match='`tritera dynamics RUN` measures'
  ):
    files.read(tmp_path)
