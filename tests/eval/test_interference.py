# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.model import oracle
from tritera_jax import cli
from tritera_jax.checkpoint import restore
from tritera_jax.data import shards
from tritera_jax.eval import interference
from tritera_jax.eval.interference import Tokens
from tritera_jax.model import decoder
from tritera_jax.scaling.dynamics import files
from tritera_jax.train import loop

T = 8


def model(family):
  config = dataclasses.replace(tiny.MODEL, family=family, context_length=T)
  params = decoder.init(config, jax.random.key(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))
  update = jax.tree.map(
    lambda leaf: 1e-3 * jax.random.normal(next(keys), leaf.shape),
    interference.differentiated(params),
  )
  windows = jax.random.randint(jax.random.key(2), (2, T + 1), 0, 384)
  return config, params, update, windows


def one_loss(config, params, window, t):
  """-log p of token t + 1 of a window, from the logits."""
  logits, _ = decoder.bind(config, params)(window[None, :-1])
  return -jax.nn.log_softmax(logits[0, t])[window[t + 1]]


def test_sums_are_those_of_a_gradient_at_a_time():
  config, params, update, windows = model('ternary')
  gradient = jax.jit(
    lambda inner, window, t: jax.grad(
      lambda inner: one_loss(config, {**params, **inner}, window, t)
    )(inner)
  )
  inner = interference.differentiated(params)
  assert set(inner) == {'layers', 'norm'}
  gradients = [
    [
      np.array(leaf, np.float64)
      for leaf in jax.tree.leaves(gradient(inner, window, t))
    ]
    for window in windows
    for t in range(T)
  ]
  moved = [np.array(leaf, np.float64) for leaf in jax.tree.leaves(update)]
  along = [
    sum(np.sum(g * u) for g, u in zip(one, moved, strict=True))
    for one in gradients
  ]
  for chunk in (3, 32):  # 3 does not divide T, 32 exceeds it
    signed, absolute, got = interference.gradient_sums(
      config, params, update, windows, chunk=chunk
    )
    np.testing.assert_allclose(np.ravel(got), along, rtol=1e-3, atol=1e-6)
    for leaf, want in zip(
      jax.tree.leaves(signed), map(sum, zip(*gradients, strict=True)),
      strict=True,
    ):  # fmt: skip
      np.testing.assert_allclose(leaf, want, rtol=1e-3, atol=2e-6)
    for n, leaf in enumerate(jax.tree.leaves(absolute)):
      want = sum(np.abs(one[n]) for one in gradients)
      np.testing.assert_allclose(leaf, want, rtol=1e-3, atol=2e-6)


def test_no_more_gradients_exist_at_once_than_a_chunk():
  """No array of the program is larger than a chunk of a leaf's gradients."""
  config, params, update, windows = model('float')
  largest = max(leaf.size for leaf in jax.tree.leaves(update))
  for chunk in (4, 8):
    program = jax.make_jaxpr(
      lambda *arrays, chunk=chunk: interference.gradient_sums(
        config, *arrays, chunk=chunk
      )
    )(params, update, jnp.tile(windows, (10, 1)))
    assert max(sizes(program.jaxpr)) == chunk * largest


def sizes(jaxpr):
  """Of every value of a program and of those that it calls."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda v: hasattr(v, 'eqns')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


def test_predictions_are_the_derivative_of_losses_along_the_update():
  config, params, update, windows = model('float')
  *_, along = interference.gradient_sums(
    config, params, update, windows, chunk=T
  )

  def losses(way):
    moved = {
      **params,
      **jax.tree.map(
        lambda leaf, by: leaf + way * by,
        interference.differentiated(params),
        update,
      ),
    }
    return np.array(
      interference.token_losses(config, moved, windows, rows=2), np.float64
    )

  want = (losses(0.25) - losses(-0.25)) / 0.5
  scale = np.abs(want).max()
  np.testing.assert_allclose(along, want, atol=0.01 * scale)


def test_losses_are_the_numpy_decoder_s_whatever_rows_come_together():
  config, params, _, windows = model('ternary')
  for rows in (1, 2, 5):
    got = interference.token_losses(config, params, windows, rows=rows)
    for window, losses in zip(np.array(windows), np.array(got), strict=True):
      logits = oracle.decoder(config, params, window[:-1])
      shifted = logits - logits.max(-1, keepdims=True)
      log_z = np.log(np.exp(shifted).sum(-1))
      want = log_z - shifted[np.arange(T), window[1:]]
      np.testing.assert_allclose(losses, want, rtol=1e-4)


@pytest.fixture(scope='module')
def run(tiny_data, tmp_path_factory):
  folder = tmp_path_factory.mktemp('dynamics') / 'run'
  loop.train(
    tiny.experiment(tiny_data, folder, 20, keep_powers=True), quiet=True
  )
  return folder


TOKENS = Tokens(losses=100, gradients=32, rows=2, chunk=8)


@pytest.fixture(scope='module')
def measured(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp('measured')
  arguments = [
    f'--tokens.{name}={value}'
    for name, value in dataclasses.asdict(TOKENS).items()
  ]
  assert cli.main(['dynamics', str(run), f'--out={folder}', *arguments]) == 0
  return folder


def test_the_update_is_the_one_that_the_run_made(run, measured, tiny_data):
  files = {path.stem: dict(np.load(path)) for path in measured.glob('*.npz')}
  steps = 1, 2, 4, 8, 16
  assert set(files) == {'training', *(f'step_{step}' for step in steps)}
  # One update after checkpoint 1 comes checkpoint 2.
  first, second = files['step_1'], files['step_2']
  experiment, before = restore.restore_params(run, 1)
  _, after = restore.restore_params(run, 2)
  moved = jax.tree.leaves(
    jax.tree.map(
      jnp.subtract,
      interference.differentiated(after),
      interference.differentiated(before),
    )
  )
  want = np.concatenate([np.ravel(leaf) for leaf in moved])
  # AdamW divides by the root of what may be rounding alone.
  assert np.mean(np.abs(first['update'] - want) > 1e-6) < 1e-2
  np.testing.assert_allclose(first['losses_after'], second['losses'], rtol=1e-3)
  # Windows of 32 that follow each other, the first after an end of text.
  text = [0, *shards.open_split(tiny_data, 'validation').read(0, 96).tolist()]
  assert len(first['losses']) == 96
  logits = oracle.decoder(experiment.model, before, np.array(text[32:64]))
  log_z = np.log(np.exp(logits).sum(-1))
  np.testing.assert_allclose(
    first['losses'][32:64],
    log_z - logits[np.arange(32), text[33:65]],
    rtol=1e-4,
  )
  assert len(first['predicted']) == 32
  assert files['training']['steps'].tolist()[:3] == [2, 4, 5]


def test_scaling_reads_what_is_written(measured):
  assert (measured / 'interference.svg').exists()
  run = files.read(measured)
  assert run.family == 'ternary'
  assert 'no steps kept after' in run.no_deceleration
  assert [c.step for c in run.checkpoints] == [1, 2, 4, 8, 16]
  assert run.checkpoints[0].held_out_loss == pytest.approx(
    math.log(384), abs=0.5
  )
  first = run.checkpoints[0]
  # Twice step 1 is one update later.
  assert first.doubling == pytest.approx(first.one_step, rel=0.01)
  for one in run.checkpoints:
    assert 0 <= one.gradient_D <= 1
    p = one.projections
    assert p.Ci == pytest.approx(p.Cg * p.CuG / p.Cug)


def test_what_is_measured_already_is_left_and_what_is_damaged_is_not(
  run, measured, tmp_path
):
  shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
  before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob('step_*')}
  (tmp_path / 'step_4.npz').write_bytes(b'PK')
  interference.collect(run, tmp_path, TOKENS)
  after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob('step_*')}
  assert {n for n in after if after[n] != before[n]} == {'step_4.npz'}
  there, here = (np.load(f / 'step_4.npz') for f in (measured, tmp_path))
  assert (there['gradient_sums'] == here['gradient_sums']).all()


def test_runs_without_such_checkpoints_are_refused(tiny_run, run, tmp_path):
  with pytest.raises(ValueError, match='needed; train with --run.keep-powers'):
    interference.collect(tiny_run, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()
  with pytest.raises(ValueError, match='tokens.chunk=0 must be >= 1'):
    Tokens(chunk=0)
  with pytest.raises(ValueError, match='no window of data.sequence_length=32'):
    interference.collect(run, tmp_path / 'out', Tokens(losses=31))
