# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest
from scipy import stats
import scipy.optimize

from tests.scaling.test_fit import FLOATLM, TRILM, UNITS, noisy, points
from tests.scaling.test_fit import D as TOKENS
from tests.scaling.test_fit import N as PARAMETERS
from tritera_jax.scaling import checks, fit, intervals, laws
from tritera_jax.scaling.fit import SQUARES
from tritera_jax.scaling.points import Points, seed_noise

SIZES = np.geomspace(1e8, 4e9, 8)


def of_n(losses) -> Points:
  return Points.of_arrays(SIZES, losses, family='ternary', counted='all')


def of_n_noisy(law=laws.TRILM_SPECTRA_1, noise=0.004, seed=3) -> Points:
  random = np.random.default_rng(seed).normal(size=len(SIZES))
  return of_n(law(SIZES) * np.exp(noise * random))


def least(model, losses, start):
  """The least sum of squares of log losses over what `model` leaves free."""
  found = scipy.optimize.least_squares(
    lambda theta: np.log(model(theta)) - np.log(losses), start, method='lm'
  )
  return 2 * found.cost


def test_a_profiles_ends_are_where_scipys_squares_have_risen():
  """S(end) = S (1 + F / degrees), by brute force."""
  some = of_n_noisy()
  found = fit.power_law(some)
  allowed = 2 * found.objective * (1 + stats.f.ppf(0.9, 1, 5) / 5)
  x = SIZES / 1e9
  ends = intervals.profile(found, parameters=1e9)
  middle = {name: each.estimate for name, each in ends.items()}
  for end in (ends['alpha'].low, ends['alpha'].high):
    squares = least(
      lambda t, end=end: np.exp(t[0]) + np.exp(t[1]) * x**-end,
      some.losses, np.log([middle['E'], middle['A']]),
    )  # fmt: skip
    assert squares == pytest.approx(allowed, rel=0.01)
  for end in (ends['E'].low, ends['E'].high):
    squares = least(
      lambda t, end=end: end + np.exp(t[0]) * x ** -t[1],
      some.losses, [np.log(middle['A']), middle['alpha']],
    )  # fmt: skip
    assert squares == pytest.approx(allowed, rel=0.01)


def test_a_predictions_ends_are_where_scipys_squares_have_risen():
  some = of_n_noisy()
  found = fit.power_law(some)
  allowed = 2 * found.objective * (1 + stats.f.ppf(0.8, 1, 5) / 5)
  there = Points.of_arrays(2e10, 1.0, family='ternary', counted='all')
  (interval,) = intervals.predictions(found, there, level=0.8)
  assert interval.estimate == pytest.approx(float(found.law(2e10)))
  assert interval.low < interval.estimate < interval.high
  x, law = SIZES / 2e10, found.constants(parameters=2e10)
  for end in (interval.low, interval.high):
    # E is what the loss there leaves to A.
    squares = least(
      lambda t, end=end: end + np.exp(t[0]) * (x ** -t[1] - 1),
      some.losses, [np.log(law['A']), law['alpha']],
    )  # fmt: skip
    assert squares == pytest.approx(allowed, rel=0.01)


def test_what_runs_do_not_bound_has_no_end():
  """A power law without an offset, so noisy that any offset below fits."""
  pure = laws.PowerLaw(E=1e-9, A=18.13, alpha=0.093, counted='all')
  ends = intervals.profile(fit.power_law(of_n_noisy(pure, noise=0.02)))
  assert ends['E'].low == 0
  assert 1.5 < ends['E'].high < 3.5


@pytest.mark.parametrize(('law', 'delta', 'draws'), [
  (TRILM, SQUARES, 80), (FLOATLM, 1e-3, 40),
])  # fmt: skip
def test_profiles_cover_the_truth_at_their_level(law, delta, draws):
  """Outside these bounds once in 2000 times, were the level exact."""
  noise = 0.005 * np.random.default_rng(7).normal(size=(draws, 20))
  losses = law(PARAMETERS, TOKENS) * np.exp(noise)
  found = fit.chinchilla(points(law(PARAMETERS, TOKENS)), delta=delta)
  low, high = intervals.profiles(
    found, fit.refit(found, losses), losses, level=0.8, **UNITS
  )
  truth = list(law.constants(**UNITS).values())
  covered = ((low <= truth) & (truth <= high)).sum(0)
  fewest, most = stats.binom.ppf([2.5e-4, 1 - 2.5e-4], draws, 0.8)
  assert np.all((fewest <= covered) & (covered <= most)), covered


def test_many_profiles_are_single_ones():
  first, second = noisy(TRILM), noisy(TRILM, 1)
  found = fit.chinchilla(first, delta=SQUARES)
  losses = np.stack([first.losses, second.losses])
  low, high = intervals.profiles(
    found, fit.refit(found, losses), losses, level=0.9
  )
  alone = intervals.profile(fit.chinchilla(second, delta=SQUARES))
  np.testing.assert_allclose(
    low[1], [each.low for each in alone.values()], rtol=1e-2
  )
  np.testing.assert_allclose(
    high[1], [each.high for each in alone.values()], rtol=1e-2
  )


def test_bootstraps_spread_as_the_noise_makes_fits_spread():
  """Beside refits to fresh noise about the truth."""
  found = fit.chinchilla(noisy(FLOATLM), delta=SQUARES)
  noise = 0.005 * np.random.default_rng(1).normal(size=(200, 20))
  fresh = fit.refit(found, FLOATLM(PARAMETERS, TOKENS) * np.exp(noise)).std(0)
  for resample in ('runs', 'residuals'):
    theta = intervals.bootstrap(found, draws=200, seed=0, resample=resample)
    np.testing.assert_array_less(0.6 * fresh, theta.std(0))
    np.testing.assert_array_less(theta.std(0), 1.8 * fresh)
    ends = intervals.percentiles(found, theta, level=0.5, **UNITS)
    alpha = theta[:, found.form.names.index('alpha')]
    inside = (ends['alpha'].low < alpha) & (alpha < ends['alpha'].high)
    assert inside.sum() == 100


def test_bootstraps_are_of_their_seed_and_of_runs_that_determine_a_law():
  found = fit.power_law(of_n_noisy())
  one = intervals.bootstrap(found, draws=20, seed=5)
  np.testing.assert_array_equal(
    one, intervals.bootstrap(found, draws=20, seed=5)
  )
  few = fit.power_law(of_n_noisy().take(range(4)))
  with pytest.raises(ValueError, match="few resamples of 4 runs.*'residuals'"):
    intervals.bootstrap(few, draws=200, seed=0)
  with pytest.raises(ValueError, match='level=90.0 must be between 0 and 1'):
    intervals.profile(few, level=90.0)


def test_the_largest_runs_are_foretold_by_the_others():
  some = noisy(TRILM, 2)
  held = checks.held_out(fit.chinchilla(some, delta=SQUARES), 'parameters')
  largest = some.parameters == some.parameters.max()
  assert held.points.names == some.take(largest).names
  alone = fit.chinchilla(some.take(~largest), delta=SQUARES).law
  foretold = alone(some.parameters[largest], some.tokens[largest])
  np.testing.assert_allclose(
    held.errors, np.log(some.losses[largest] / foretold), atol=1e-6
  )
  assert held.score < 0.02
  assert held.inside >= 3
  # A run that is 10 % off is outside.
  worse = dataclasses.replace(some, losses=some.losses * (1 + 0.1 * largest))
  held = checks.held_out(fit.chinchilla(worse, delta=SQUARES), 'parameters')
  assert held.inside == 0
  with pytest.raises(ValueError, match='parameters.*2 distinct values'):
    three = some.take(np.isin(some.parameters, np.unique(some.parameters)[:3]))
    checks.held_out(fit.chinchilla(three), 'parameters')


def test_the_run_that_bends_a_fit_most_is_the_odd_one():
  some = noisy(TRILM)
  some.losses[5] *= 1.03
  found = fit.chinchilla(some, delta=SQUARES)
  left = checks.leave_one_out(found, **UNITS)
  assert np.argmax(np.abs(left.errors)) == 5
  others = np.arange(20) != 5
  alone = fit.chinchilla(some.take(others), delta=SQUARES)
  np.testing.assert_allclose(
    left.constants[5], list(alone.constants(**UNITS).values()), rtol=1e-4
  )


def test_lack_of_fit_tells_a_wrong_law_from_noise():
  twice = noisy(TRILM, 0).and_then(noisy(TRILM, 1))
  right = checks.lack_of_fit(fit.chinchilla(twice, delta=SQUARES))
  assert right is not None and right.p > 0.01
  # A law of N alone does not know of tokens.
  wrong = checks.lack_of_fit(fit.power_law(twice))
  assert wrong is not None and wrong.p < 1e-6
  assert checks.lack_of_fit(fit.chinchilla(noisy(TRILM))) is None


def test_lack_of_fit_is_the_f_test_of_the_textbook():
  """On a Huber fit too: SS about least squares less SS of pairs, by hand."""
  first, second = noisy(TRILM, 0), noisy(TRILM, 1)
  twice = first.and_then(second)
  squares = fit.chinchilla(twice, delta=SQUARES)
  pure = np.sum((np.log(first.losses) - np.log(second.losses)) ** 2) / 2
  about = np.sum(squares.residuals**2) - pure
  found = checks.lack_of_fit(fit.chinchilla(twice, delta=1e-3))
  assert found is not None and found.degrees == (40 - 5 - 20, 20)
  assert found.ratio == pytest.approx(about / 15 / (pure / 20), rel=1e-6)
  assert found.p == pytest.approx(stats.f.sf(found.ratio, 15, 20))
  # Seeds of other runs are all that one without repeats has.
  alone = fit.chinchilla(first)
  pooled = checks.lack_of_fit(alone, seed_noise(twice))
  assert pooled is not None and pooled.degrees == (15, 20)


def test_the_ends_of_gamma_are_where_scipys_squares_have_risen():
  """Two families in bits: what each end leaves to the other five constants."""
  ternary, floating = laws.BITS['ternary'], laws.BITS['float']
  law = laws.BitsLaw(FLOATLM, gamma=1.7)
  of_ternary = dataclasses.replace(noisy(TRILM), losses=noise_of(law, ternary))
  of_float = points(noise_of(law, floating, 1), 'float')
  both = of_ternary.and_then(of_float)
  found = fit.in_bits(both, delta=SQUARES)
  end = intervals.profile(found, level=0.8, **UNITS)['gamma']
  allowed = 2 * found.objective * (1 + stats.f.ppf(0.8, 1, 34) / 34)
  at = found.constants(**UNITS)
  start = [np.log(at['E']), np.log(at['A']), at['alpha'], np.log(at['B']),
           at['beta']]  # fmt: skip
  bits = np.repeat([ternary, floating], 20)
  for gamma in (end.low, end.high):
    x = both.parameters / 1e6 * (1 - np.exp(-bits / gamma))
    squares = least(
      lambda t, x=x: np.exp(t[0])
      + np.exp(t[1]) * x ** -t[2]
      + np.exp(t[3]) * (both.tokens / 1e9) ** -t[4],
      both.losses, start,
    )  # fmt: skip
    assert squares == pytest.approx(allowed, rel=0.01)


def noise_of(law, bits, seed=0):
  random = np.random.default_rng(seed).normal(size=20)
  return law(PARAMETERS, TOKENS, bits) * np.exp(0.005 * random)
