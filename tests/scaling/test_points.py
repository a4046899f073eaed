# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest

from tritera_jax.scaling import fit
from tritera_jax.scaling.points import Points, seed_noise
from tritera_jax.scaling.runs import Run

SIZES, BUDGETS = np.array([1e6, 4e6, 1e7]), np.array([1e8, 3e8, 1e9])


def points(parameters, tokens, losses=3.0, family='ternary') -> Points:
  return Points.of_arrays(
    parameters, losses, family=family, counted='all', tokens=tokens
  )


def grid(sizes=SIZES, budgets=BUDGETS, family='ternary') -> Points:
  N, D = (each.ravel() for each in np.meshgrid(sizes, budgets))
  losses = 2 + (N / 1e6) ** -0.3 + (D / 1e8) ** -0.4
  return points(N, D, losses, family)


def test_n_is_counted_as_named():
  run = Run(
    name='a', family='ternary', parameters=300, tokens=7, seed=0,
    parameters_without_embeddings=100, bits=1.0, flops=1.0,
    held_out_loss=3.0, bits_per_byte=1.0, seconds=1.0,
  )  # fmt: skip
  whole = Points.of_runs([run], 'all')
  inner = Points.of_runs([run], 'without_embeddings')
  assert (whole.parameters[0], inner.parameters[0]) == (300, 100)
  assert whole.counted == 'all'
  with pytest.raises(ValueError, match=r"'all' here.*'without_embeddings'"):
    whole.and_then(inner)


def run(name='a', **fields) -> Run:
  return Run(**{
    'name': name, 'family': 'ternary', 'parameters': 300, 'tokens': 7,
    'seed': 0, 'parameters_without_embeddings': 100, 'bits': 1.0, 'flops': 1.0,
    'held_out_loss': 3.0, 'bits_per_byte': 1.0, 'seconds': 1.0, **fields,
  })  # fmt: skip


def test_the_same_cell_under_another_name_is_refused():
  with pytest.raises(
    ValueError,
    match="runs 'a' and 'b' are the same cell: ternary, parameters=300, "
    'tokens=7, seed=0; leave one out',
  ):
    Points.of_runs([run(), run('b', held_out_loss=3.1)], 'all')
  for other in (
    {'seed': 1}, {'family': 'float'}, {'tokens': 8}, {'parameters': 301},
    {'parameters_without_embeddings': 99},
  ):  # fmt: skip
    assert len(Points.of_runs([run(), run('b', **other)], 'all')) == 2


def test_losses_of_other_text_are_refused():
  unsaid, mine = run('old', seed=1), run(held_out='abc-def')
  alike = run('b', seed=2, held_out='abc-def')
  assert len(Points.of_runs([unsaid, mine, alike], 'all')) == 3
  with pytest.raises(
    ValueError, match="run 'c' was scored on held_out=abc-xyz, 'a' on abc-def"
  ):
    Points.of_runs([unsaid, mine, run('c', seed=3, held_out='abc-xyz')], 'all')


def test_more_parameters_without_embeddings_than_with_are_refused():
  with pytest.raises(ValueError, match='embeddings=301 of a must be <= param'):
    run(parameters_without_embeddings=301)


def test_copies_say_nothing_of_noise():
  some = [run('a'), run('b', seed=1)]  # the same loss to the digit
  assert seed_noise(Points.of_runs(some, 'all')) is None
  one = Points.of_runs([run()], 'all')
  other = Points.of_runs([run(held_out_loss=3.3)], 'all')
  assert seed_noise(one.and_then(other)) is None  # one seed
  third = Points.of_runs([run(seed=1, held_out_loss=3.3)], 'all')
  noise = seed_noise(one.and_then(other).and_then(third))
  assert noise is not None and noise.degrees == 1
  assert noise.relative == pytest.approx(np.log(1.1) / 2**0.5)


def test_seed_noise_is_pooled_over_cells_with_repeats():
  """By hand: log losses 0.01 apart twice, and three at 0, 0.01 and 0.02."""
  logs = [0, 0.01, 0, 0.01, 0.02, 5]
  some = points([1, 1, 2, 2, 2, 3], 1e9, np.exp(logs))
  noise = seed_noise(some)
  assert noise is not None and noise.degrees == 3
  assert noise.relative == pytest.approx(np.sqrt((0.5e-4 + 2e-4) / 3))
  assert seed_noise(grid()) is None


NINE = grid()


@pytest.mark.parametrize(('bad', 'words'), [
  (NINE.take(range(5)), '5 runs for a law of 5 constants.*at least 6'),
  (grid(SIZES[:1], np.geomspace(1e8, 1e9, 7)), 'parameters.*1 distinct value:'),
  (grid(SIZES[:2]), 'parameters of the runs have 2 distinct values'),
  (grid(budgets=BUDGETS[:1] * [1, 1, 1]), 'tokens of the runs have 1 distinct'),
  (points(np.geomspace(1e6, 1e9, 7), 20 * np.geomspace(1e6, 1e9, 7)),
   'D/N is 20 in every run.*other tokens at one size'),
  (points(np.geomspace(1e6, 1e9, 7), np.geomspace(1e6, 1e9, 7) ** 0.5),
   r'D goes as N\^0.50'),
  (points(NINE.parameters, np.nan), "tokens of run 'ternary_0' are not known"),
])  # fmt: skip
def test_runs_that_determine_no_law_are_refused(bad, words):
  with pytest.raises(ValueError, match=words):
    fit.chinchilla(bad)


@pytest.mark.parametrize(('field', 'value'), [
  ('losses', np.nan), ('losses', np.inf), ('losses', 0.0),
  ('parameters', -1.0), ('tokens', 0.0),
])  # fmt: skip
def test_a_number_that_is_none_is_refused_by_run_and_field(field, value):
  values = getattr(NINE, field).copy()
  values[4] = value
  with pytest.raises(ValueError, match=f"{field}={value} of run 'ternary_4'"):
    dataclasses.replace(NINE, **{field: values})


def test_repeats_with_other_seeds_are_no_new_sizes():
  repeated = grid(SIZES[:2]).and_then(grid(SIZES[:2]))
  with pytest.raises(ValueError, match='parameters of the runs have 2'):
    fit.chinchilla(repeated)
  fit.chinchilla(NINE.and_then(NINE))


def test_each_family_of_a_joint_fit_must_determine_its_own():
  joint = NINE.and_then(grid(SIZES[:2], family='binary'))
  with pytest.raises(ValueError, match='parameters of the runs have 2'):
    fit.chinchilla(joint, shared=('E',))
  fit.chinchilla(joint, shared=('E', 'alpha', 'beta'))


def test_wrong_settings_are_refused():
  with pytest.raises(ValueError, match=r"shared=\['gamma'\].*'alpha'"):
    fit.chinchilla(NINE, shared=('gamma',))
  with pytest.raises(ValueError, match='delta=0.0 must be > 0'):
    fit.chinchilla(NINE, delta=0.0)
  with pytest.raises(ValueError, match='ternary alone say nothing of bits'):
    fit.in_bits(NINE)
  both = fit.chinchilla(NINE.and_then(grid(family='float')))
  with pytest.raises(ValueError, match=r'ternary, float has a law each'):
    _ = both.law
  with pytest.raises(ValueError, match=r"'binary'.*not of this fit"):
    fit.form_at(both, grid(family='binary'))
