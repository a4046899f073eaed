# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
import scipy.optimize

from tritera_jax.scaling import fit, laws, minimize
from tritera_jax.scaling.fit import SQUARES
from tritera_jax.scaling.points import Points

SIZES = np.array([48.2e6, 113.2e6, 289.4e6, 679.5e6, 968.9e6])
TOKENS = np.array([20e9, 50e9, 100e9, 150e9])
N, D = (each.ravel() for each in np.meshgrid(SIZES, TOKENS))
TRILM, FLOATLM = laws.TRILM_SPECTRA_1_1, laws.FLOATLM_SPECTRA_1_1
UNITS = {'parameters': 1e6, 'tokens': 1e9}


def points(losses, family='ternary') -> Points:
  return Points.of_arrays(
    N, losses, family=family, counted='without_embeddings', tokens=D
  )


def noisy(law, seed=0) -> Points:
  return points(law(N, D) * np.exp(0.005 * noise(seed)))


def noise(seed):
  return np.random.default_rng(seed).normal(size=len(N))


def log_law(theta, x, y):
  """Of constants as laws have them, N in millions and D in billions."""
  E, A, alpha, B, beta = theta
  return np.log(E + A * x**-alpha + B * y**-beta)


def test_huber_by_hand():
  loss = minimize.huber(np.array([5e-4, -3e-3, 0]), 1e-3)
  np.testing.assert_allclose(loss, [1.25e-7, 1e-3 * 2.5e-3, 0])


@pytest.mark.parametrize('law', [TRILM, FLOATLM])
@pytest.mark.parametrize('delta', [SQUARES, 1e-3])
def test_losses_without_noise_give_the_constants_back(law, delta):
  found = fit.chinchilla(points(law(N, D)), delta=delta)
  truth = law.constants(**UNITS)
  assert found.constants(**UNITS) == pytest.approx(truth, rel=1e-6)
  assert found.law(1e9, 1e12) == pytest.approx(law(1e9, 1e12), rel=1e-7)
  assert found.law.counted == 'without_embeddings'


def test_the_law_of_n_alone_comes_back():
  law = laws.TRILM_SPECTRA_1
  sizes = np.geomspace(1e8, 4e9, 5)
  found = fit.power_law(
    Points.of_arrays(sizes, law(sizes), family='ternary', counted='all')
  )
  assert found.constants() == pytest.approx(law.constants(1.0, 1.0), rel=1e-6)


@pytest.mark.parametrize('law', [TRILM, FLOATLM])
def test_least_squares_are_scipys(law):
  some = noisy(law)
  found = fit.chinchilla(some, delta=SQUARES)
  truth = list(law.constants(**UNITS).values())
  theirs, _ = scipy.optimize.curve_fit(
    lambda at, *theta: log_law(theta, *at),
    (N / 1e6, D / 1e9), np.log(some.losses), p0=truth, xtol=1e-12, ftol=1e-12,
  )  # fmt: skip
  ours = list(found.constants(**UNITS).values())
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize('seed', range(3))
def test_hubers_minimum_is_no_higher_than_that_of_l_bfgs(seed):
  """2203.15556, 3.3, written out; L-BFGS is started at the truth."""
  some = noisy(TRILM, seed)

  def chinchilla_objective(theta):
    log_E, log_A, alpha, log_B, beta = theta
    law = np.exp(log_E), np.exp(log_A), alpha, np.exp(log_B), beta
    residual = np.abs(log_law(law, N / 1e6, D / 1e9) - np.log(some.losses))
    near = residual <= 1e-3
    far = 1e-3 * (residual - 5e-4)
    # In units of delta squared, or their tolerance ends it early.
    return np.where(near, residual**2 / 2, far).sum() * 1e6

  def start(constants):
    E, A, alpha, B, beta = constants.values()
    return [np.log(E), np.log(A), alpha, np.log(B), beta]

  theirs = scipy.optimize.minimize(
    chinchilla_objective, start(TRILM.constants(**UNITS)), method='L-BFGS-B'
  )
  found = fit.chinchilla(some)
  ours = chinchilla_objective(start(found.constants(**UNITS)))
  assert ours == pytest.approx(1e6 * found.objective)
  assert ours <= theirs.fun * (1 + 1e-6)


def test_derivatives_are_those_of_differences():
  both = noisy(TRILM).and_then(
    dataclasses.replace(noisy(FLOATLM), families=('float',) * len(N))
  )
  for found in (fit.chinchilla(both, shared=('E',)), fit.in_bits(both)):
    form, P = found.form, len(found.theta)
    theta = found.theta + 0.03 * np.random.default_rng(0).normal(size=P)
    rest = np.log(both.losses)[None], np.ones((1, len(both))), 0.02
    gradient, hessian, _ = minimize.derivatives(form, theta[None], *rest)
    step = 1e-5 * np.eye(P)
    up = minimize.objective(form, theta + step, *rest)
    down = minimize.objective(form, theta - step, *rest)
    size = np.abs(gradient).max()
    np.testing.assert_allclose(
      gradient[0], (up - down) / 2e-5, atol=1e-7 * size
    )
    if found.kind == 'chinchilla':  # in bits it leaves a part out
      up, _, _ = minimize.derivatives(form, theta + step, *rest)
      down, _, _ = minimize.derivatives(form, theta - step, *rest)
      size = np.abs(hessian).max()
      np.testing.assert_allclose(
        hessian[0], (up - down) / 2e-5, atol=1e-5 * size
      )


def test_units_of_n_d_and_loss_only_scale_coefficients():
  some = noisy(TRILM)
  scaled = dataclasses.replace(
    some,
    parameters=some.parameters * 1000,
    tokens=some.tokens / 7,
    losses=some.losses * 1.4427,
  )
  before, after = fit.chinchilla(some).law, fit.chinchilla(scaled).law
  assert after.alpha == pytest.approx(before.alpha, rel=1e-5)
  assert after.beta == pytest.approx(before.beta, rel=1e-5)
  coefficients = before.E, before.A * 1000**before.alpha
  np.testing.assert_allclose(
    (after.E, after.A), np.multiply(1.4427, coefficients), rtol=1e-4
  )


def test_the_order_of_runs_does_not_matter():
  some = noisy(FLOATLM)
  order = np.random.default_rng(1).permutation(len(N))
  for delta in (SQUARES, 1e-3):
    one = fit.chinchilla(some, delta=delta)
    other = fit.chinchilla(some.take(order), delta=delta)
    assert other.constants() == pytest.approx(one.constants(), rel=1e-4)


def test_one_wild_run_moves_huber_less_than_squares():
  some = noisy(TRILM)
  wild = dataclasses.replace(some, losses=some.losses.copy())
  wild.losses[7] *= 1.1
  moved = {}
  for delta in (SQUARES, 1e-3):
    calm = fit.chinchilla(some, delta=delta).law(N, D)
    moved[delta] = np.abs(fit.chinchilla(wild, delta=delta).law(N, D) - calm)
  assert moved[1e-3].max() < moved[SQUARES].max() / 2


def both_families(ternary, floating) -> Points:
  return points(ternary).and_then(points(floating, 'float'))


def test_families_that_share_nothing_are_fitted_as_if_alone():
  ternary, floating = noisy(TRILM), noisy(FLOATLM, 1)
  joint = fit.chinchilla(
    both_families(ternary.losses, floating.losses), delta=SQUARES
  )
  for family, alone in (('ternary', ternary), ('float', floating)):
    law = fit.chinchilla(alone, delta=SQUARES).law
    np.testing.assert_allclose(joint.laws[family](N, D), law(N, D), rtol=1e-6)


def test_what_families_share_comes_back():
  floating = dataclasses.replace(FLOATLM, E=TRILM.E, beta=TRILM.beta)
  joint = fit.chinchilla(
    both_families(TRILM(N, D), floating(N, D)), shared=('beta', 'E')
  )
  assert len(joint.theta) == 8
  for family, law in (('ternary', TRILM), ('float', floating)):
    back = joint.laws[family].constants(**UNITS)
    assert back == pytest.approx(law.constants(**UNITS), rel=1e-5)
  assert joint.constants()['beta'] == pytest.approx(0.81)
  assert joint.constants()['alpha[ternary]'] == pytest.approx(0.32)


@pytest.mark.parametrize('delta', [SQUARES, 1e-3])
def test_a_law_in_bits_comes_back_from_three_families(delta):
  law = laws.BitsLaw(FLOATLM, gamma=1.7)
  binary = points(law(N, D, 1.0), 'binary').take([0, 6, 19])
  some = both_families(law(N, D, laws.BITS['ternary']), law(N, D, 16.0))
  found = fit.in_bits(some.and_then(binary), delta=delta)
  truth = law.constants(**UNITS)
  assert found.constants(**UNITS) == pytest.approx(truth, rel=1e-5)
  assert found.law(1e9, 1e12, 4.0) == pytest.approx(law(1e9, 1e12, 4.0))


def test_refits_are_fits_of_other_losses_and_weights():
  first, second = noisy(TRILM), noisy(TRILM, 1)
  found = fit.chinchilla(first, delta=SQUARES)
  theta = fit.refit(found, second.losses[None])[0]
  anew = fit.chinchilla(second, delta=SQUARES)
  np.testing.assert_allclose(theta, anew.theta, atol=1e-5)
  # A weight of two is a run twice, none is none.
  weights = np.ones((1, len(N)))
  weights[0, :2] = 2, 0
  theta = fit.refit(found, first.losses[None], weights)[0]
  twice = first.take([0, 0, *range(2, len(N))])
  law = fit.chinchilla(twice, delta=SQUARES).law
  np.testing.assert_allclose(
    fit.law_of(found, theta, 'ternary')(N, D), law(N, D), rtol=1e-6
  )


def test_mulocos_published_losses_follow_a_law_of_n():
  """2505.23725: five sizes with AdamW; a law of three constants."""
  sizes = [150e6, 416e6, 914e6, 1.76e9, 3.1e9]
  losses = [3.158, 2.682, 2.440, 2.266, 2.145]
  found = fit.power_law(
    Points.of_arrays(sizes, losses, family='float', counted='all')
  )
  assert np.abs(found.residuals).max() < 0.005
  theirs, _ = scipy.optimize.curve_fit(
    lambda x, E, A, alpha: np.log(E + A * x**-alpha),
    np.array(sizes) / 1e6, np.log(losses), p0=[1.5, 10.0, 0.3],
  )  # fmt: skip
  ours = list(found.constants(parameters=1e6).values())
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
