# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest

from tritera_jax.scaling import families, laws, plan
from tritera_jax.scaling.costs import Growth, Serving, Shapes

TRILM, FLOATLM = laws.TRILM_SPECTRA_1_1, laws.FLOATLM_SPECTRA_1_1
PLAIN = Shapes('without_embeddings')  # no embeddings, 6 N D FLOPs


def fitted(law, draws=()) -> plan.Fitted:
  return plan.Fitted(law, tuple(draws), (99e6, 1.1e9), (20e9, 150e9))


def one(law, budget, shapes=PLAIN, serving=Serving(), family='ternary'):
  return plan.best({family: fitted(law)}, budget, shapes, serving)[0]


@pytest.mark.parametrize(
  ('law', 'exponent'), [(TRILM, 0.717), (FLOATLM, 0.486)]
)
def test_sizes_grow_with_compute_as_the_exponents_say(law, exponent):
  # Of Spectra 1.1: TriLM N ~ C^0.717, FloatLM C^0.486.
  small, large = (one(law, plan.Budget(flops)) for flops in (1e20, 1e24))
  grown = np.log10(large.parameters.estimate / small.parameters.estimate) / 4
  assert grown == pytest.approx(exponent, abs=5e-4)
  # Hoffmann et al. (2203.15556), eq. 4: N = G (C / 6)^(beta / (alpha + beta)).
  power = 1 / (law.alpha + law.beta)
  G = (law.alpha * law.A / (law.beta * law.B)) ** power
  expected = G * (1e20 / 6) ** (law.beta * power)
  assert small.parameters.estimate == pytest.approx(expected, rel=1e-4)
  assert 6 * small.parameters.estimate * small.tokens.estimate == pytest.approx(
    1e20
  )
  assert small.training_flops == pytest.approx(1e20)


def brute_force(law, *, flops=np.inf, tokens=np.inf, allowed, grown):
  """The least loss over a grid of N and D, each point asked by itself."""
  # The grid is 1.2 % wide.
  N = np.geomspace(1e5, 1e12, 1401)[:, None]
  D = np.geomspace(1e7, 1e14, 1401)[None, :]
  loss = np.where(
    (grown(N) * D <= flops * 1.0001) & (tokens >= D) & allowed(N),
    law(N, D),
    np.inf,
  )
  n, d = np.unravel_index(loss.argmin(), loss.shape)
  return N[n, 0], D[0, d], loss[n, d]


@pytest.mark.parametrize('law', [TRILM, FLOATLM])
def test_budgets_are_kept_together_as_brute_force_finds(law):
  shapes = Shapes('without_embeddings', Growth(2e4, 0.45), 6.0, 3.0)

  def head(N):
    return 2e4 * N**0.45

  cases = (
    (plan.Budget(training_flops=3e20), lambda N: N > 0),
    (plan.Budget(training_flops=3e20, tokens=6e10), lambda N: N > 0),
    (
      plan.Budget(training_flops=3e20, served_bytes=3e8),
      lambda N: (1.6 * N + 16 * head(N)) / 8 <= 3e8,
    ),
    (
      plan.Budget(tokens=1e11, joules_per_token=0.02),
      # Half of embedding and head is read and multiplied; 32 pJ a byte.
      lambda N: (
        (1.6 * N + 8 * head(N)) / 8 * 32e-12
        + 0.4e-12 * N + 1.5e-12 * head(N) / 2 <= 0.02
      ),
    ),
  )  # fmt: skip
  for budget, allowed in cases:
    choice = one(law, budget, shapes)
    N, D, loss = brute_force(
      law,
      flops=budget.flops,
      tokens=budget.tokens or np.inf,
      allowed=allowed,
      grown=lambda N: 6 * N + 3 * head(N),
    )
    assert choice.loss.estimate == pytest.approx(loss, abs=2e-3)
    assert choice.loss.estimate <= loss + 1e-9
    assert choice.parameters.estimate == pytest.approx(N, rel=0.1)
    assert choice.tokens.estimate == pytest.approx(D, rel=0.1)


@pytest.mark.filterwarnings('error')
def test_all_parameters_counted_no_model_is_of_embeddings_alone():
  shapes = Shapes('all', Growth(2e4, 0.45), 6.0, 3.0)
  tiny = one(TRILM, plan.Budget(training_flops=1e9), shapes)
  assert shapes.smallest == 20_001 <= tiny.parameters.estimate
  assert tiny.training_flops == pytest.approx(1e9)


def test_gpu_days_are_flops():
  # 10 days of 989e12 FLOP/s at 40 %: 10 * 86400 * 989e12 * 0.4 = 3.418e20.
  days = plan.Budget(gpu_days=10.0, gpu_flops_per_second=989e12, mfu=0.4)
  assert days.flops == pytest.approx(3.418e20, rel=1e-3)
  assert one(TRILM, days).training_flops == pytest.approx(3.418e20, rel=1e-3)


def test_intervals_are_those_of_draws_and_the_best_family_wins_draws():
  # E moves the loss and nothing else: 41 draws from -0.2 to 0.2.
  shifts = np.linspace(-0.2, 0.2, 41)

  def shifted(law, by):
    return laws.ChinchillaLaw(
      law.E + by, law.A, law.alpha, law.B, law.beta, law.counted
    )

  families = {
    'ternary': fitted(TRILM, [shifted(TRILM, by) for by in shifts]),
    'float': fitted(FLOATLM, [shifted(FLOATLM, 0) for _ in shifts]),
  }
  first, second = plan.best(families, plan.Budget(1e22), PLAIN)
  assert (first.family, second.family) == ('float', 'ternary')
  assert second.loss.high - second.loss.low == pytest.approx(0.36, abs=1e-6)
  assert second.parameters.high == pytest.approx(second.parameters.low)
  gap = second.loss.estimate - first.loss.estimate
  assert second.wins == pytest.approx(np.mean(shifts < -gap))
  assert first.wins == pytest.approx(1 - second.wins)


def test_what_lies_beyond_the_runs_is_told():
  inside = fitted(TRILM)
  assert inside.beyond(5e8, 1e11) == 1.0
  assert inside.beyond(3.3e9, 1e11) == pytest.approx(3.0)
  assert inside.beyond(5e8, 1.5e12) == pytest.approx(10.0)
  assert inside.beyond(9.9e6, 3e11) == pytest.approx(10.0)


def test_a_corner_that_no_run_reaches_is_beyond_the_runs():
  # The committed grid's shape: the largest D for the two smallest N alone.
  sizes, budgets = np.array([36e3, 106e3, 332e3, 1.08e6]), (0.5e6, 4.2e6)
  N, D = (each.ravel() for each in np.meshgrid(sizes, budgets))
  N, D = np.append(N, sizes[:2]), np.append(D, [11.9e6, 11.9e6])
  some = plan.Fitted(TRILM, (), N, D)
  assert some.beyond(106e3, 11.9e6) == some.beyond(1.08e6, 4.2e6) == 1.0
  # To 4.2e6 tokens or to 106e3 parameters, whichever is nearer.
  assert some.beyond(1.08e6, 11.9e6) == pytest.approx(11.9 / 4.2)
  assert some.beyond(300e3, 11.9e6) == pytest.approx(300 / 106)
  assert some.beyond(110e3, 11.9e6) == pytest.approx(110 / 106)
  assert some.largest(PLAIN) == (1.08e6, 4.2e6)
  assert families.common_tokens([some]) == 4.2e6
  np.testing.assert_allclose(some.beyond(N, D), 1.0)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'training_flops': -1.0}, r'training_flops=-1.0 must be > 0'),
    ({'gpu_days': 3.0}, 'go together: give all three'),
    (
      {'gpu_days': 3.0, 'gpu_flops_per_second': 1e15, 'mfu': 40.0},
      'mfu=40.0 must be <= 1',
    ),
  ],
)
def test_budgets_without_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    plan.Budget(**fields)


def test_a_budget_too_small_for_any_model_is_refused():
  with pytest.raises(
    ValueError,
    match=re.escape('no ternary model is so small as served_bytes=0.1'),
  ):
    one(TRILM, plan.Budget(tokens=1e9, served_bytes=0.1))


def test_a_family_with_no_model_so_small_is_left_out():
  # Ten bytes are 50 ternary weights; half of one float weight takes one.
  both = {'float': fitted(FLOATLM), 'ternary': fitted(TRILM)}
  (choice,) = plan.best(both, plan.Budget(tokens=1e9, served_bytes=1.5), PLAIN)
  assert (choice.family, choice.wins) == ('ternary', 1.0)


@pytest.mark.parametrize('fields', [{'served_bytes': 1e9}, {'tokens': 1e9}])
def test_budgets_without_a_bound_are_refused(fields):
  with pytest.raises(ValueError, match='else N or D has no bound'):
    plan.Budget(**fields)


def test_no_budget_at_all_plans_nothing():
  with pytest.raises(ValueError, match='else N or D has no bound'):
    one(TRILM, plan.Budget())
