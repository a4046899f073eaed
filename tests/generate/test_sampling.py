# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tritera_jax.generate import sampling
from tritera_jax.generate.sampling import Sampling

P = np.array([[0.05, 0.4, 0.1, 0.25, 0.2], [0.9, 0.02, 0.03, 0.04, 0.01]])
LOGITS = jnp.log(jnp.asarray(P, jnp.float32)) + 3.0


def kept(**settings):
  logits = sampling.filtered_logits(
    Sampling(**{'temperature': 1.0, **settings}), LOGITS
  )
  return [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(logits)]


@pytest.mark.parametrize(
  ('settings', 'want'),
  [
    ({}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
    ({'top_k': 2}, [{1, 3}, {0, 3}]),
    ({'top_k': 9}, [{0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}]),
    # 0.4, 0.65, 0.85: the third reaches 0.7.
    ({'top_p': 0.7}, [{1, 3, 4}, {0}]),
    ({'top_p': 1e-6}, [{1}, {0}]),
    # Of the two kept, 0.4 / 0.65 = 0.62 reaches 0.6.
    ({'top_k': 2, 'top_p': 0.6}, [{1}, {0}]),
    # 0.45 * 0.4 = 0.18 and 0.45 * 0.9 = 0.405.
    ({'min_p': 0.45}, [{1, 3, 4}, {0}]),
    ({'min_p': 1.0}, [{1}, {0}]),
    # At temperature 2, sqrt(0.04 / 0.9) = 0.21 but sqrt(0.03 / 0.9) = 0.18.
    ({'min_p': 0.2, 'temperature': 2.0}, [{0, 1, 2, 3, 4}, {0, 3}]),
    ({'top_k': 2, 'min_p': 0.1}, [{1, 3}, {0}]),
  ],
)
def test_filters_keep_the_tokens_counted_by_hand(settings, want):
  assert kept(**settings) == want


def test_temperature_zero_is_the_most_likely():
  keys = jax.random.split(jax.random.key(0), 2)
  assert sampling.sample(Sampling(), keys, LOGITS).tolist() == [1, 0]


def test_samples_follow_the_distribution():
  settings = Sampling(temperature=2.0)
  keys = jax.random.split(jax.random.key(0), 20_000)
  rows = jnp.broadcast_to(LOGITS[0], (20_000, 5))
  tokens = sampling.sample(settings, keys, rows)
  want = P[0] ** 0.5 / (P[0] ** 0.5).sum()
  got = np.bincount(tokens, minlength=5) / 20_000
  np.testing.assert_allclose(got, want, atol=0.02)


def numpy_min_p(logits, temperature, min_p):
  p = np.exp(np.float64(logits) / temperature)
  p /= p.sum(-1, keepdims=True)
  return p >= min_p * p.max(-1, keepdims=True)


def numpy_penalty(logits, seen, penalty):
  """CTRL's, one logit at a time; `seen` lists ids for each row."""
  out = np.array(logits)
  for row, ids in enumerate(seen):
    for i in set(ids):
      x = out[row, i]
      out[row, i] = x / penalty if x > 0 else x * penalty
  return out


@pytest.mark.parametrize('temperature', [0.5, 1.0, 1.7])
@pytest.mark.parametrize('min_p', [0.01, 0.1, 0.6])
def test_min_p_keeps_what_its_definition_keeps(temperature, min_p):
  logits = np.random.default_rng(0).normal(0, 3, (64, 50)).astype(np.float32)
  got = sampling.filtered_logits(
    Sampling(temperature=temperature, min_p=min_p), jnp.asarray(logits)
  )
  want = numpy_min_p(logits, temperature, min_p)
  np.testing.assert_array_equal(np.isfinite(got), want)
  np.testing.assert_allclose(
    np.asarray(got)[want], logits[want] / temperature, rtol=1e-6
  )


@pytest.mark.parametrize('penalty', [0.5, 1.3])
def test_the_penalty_bears_on_seen_tokens_by_its_definition(penalty):
  rng = np.random.default_rng(1)
  logits = rng.normal(0, 3, (3, 20)).astype(np.float32)
  seen = [[0, 4, 4, 19], [], list(range(20))]
  mask = np.zeros((3, 20), bool)
  for row, ids in enumerate(seen):
    mask[row, ids] = True
  settings = Sampling(repetition_penalty=penalty)
  got = sampling.penalized_logits(
    settings, jnp.asarray(logits), jnp.asarray(mask)
  )
  want = numpy_penalty(logits, seen, penalty)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  keys = jax.random.split(jax.random.key(0), 3)
  chosen = sampling.sample(
    settings, keys, jnp.asarray(logits), jnp.asarray(mask)
  )
  np.testing.assert_array_equal(chosen, want.argmax(-1))


def test_the_penalty_comes_before_temperature_and_filters():
  # The penalty halves the first to 1; then 2, 1, 1 over 0.5 are 4, 2, 2.
  keys = jax.random.split(jax.random.key(0), 4000)
  logits = jnp.broadcast_to(jnp.asarray([2.0, 2.0, 1.0]), (4000, 3))
  seen = jnp.broadcast_to(jnp.asarray([True, False, False]), (4000, 3))
  settings = Sampling(temperature=0.5, repetition_penalty=2.0)
  tokens = sampling.sample(settings, keys, logits, seen)
  p = np.exp([2.0, 4.0, 2.0])
  got = np.bincount(tokens, minlength=3) / 4000
  np.testing.assert_allclose(got, p / p.sum(), atol=0.03)
  only = Sampling(temperature=0.5, repetition_penalty=2.0, top_k=1)
  assert set(sampling.sample(only, keys, logits, seen).tolist()) == {1}


@pytest.mark.parametrize(
  ('field', 'value', 'fix'),
  [
    ('temperature', -1.0, '>= 0'),
    ('top_k', -1, '0 keeps all'),
    ('top_p', 0.0, '(0, 1]'),
    ('min_p', -0.1, '0 keeps all'),
    ('min_p', 1.5, '[0, 1]'),
    ('repetition_penalty', 0.0, '1 is off'),
    ('repetition_penalty', -1.0, '> 0'),
    ('repetition_penalty', float('nan'), '> 0'),
  ],
)
def test_settings_that_mean_nothing_are_refused(field, value, fix):
  with pytest.raises(ValueError) as error:
    Sampling(**{field: value})
  assert f'{field}={value} must' in str(error.value)
  assert fix in str(error.value)
