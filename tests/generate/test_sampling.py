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


@pytest.mark.parametrize(
  ('field', 'value'), [('temperature', -1.0), ('top_k', -1), ('top_p', 0.0)]
)
def test_settings_that_mean_nothing_are_refused(field, value):
  with pytest.raises(ValueError, match=f'{field}={value}'):
    Sampling(**{field: value})
