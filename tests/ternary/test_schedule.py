# SPDX-License-Identifier: Apache-2.0
import math

import jax.numpy as jnp
import numpy as np
import pytest

from tritera_jax.ternary import schedule

STEPS = 300


def values(function):
  """A schedule at steps 0..STEPS."""
  return [float(function(jnp.int32(t), STEPS)) for t in range(STEPS + 1)]


def test_trilm_steps_down_at_half_and_stops_decaying_at_two_thirds():
  # Spectra's TriLM 99M: 2.4e-3, then 1.5e-3 (Table 3).
  trilm = schedule.TriLMSchedule(2.4e-3, 1.5e-3, warmup_steps=10)
  rates = values(trilm.learning_rate)
  for t in range(STEPS + 1):
    peak = 2.4e-3 if t < 150 else 1.5e-3
    want = peak * (1 - t / STEPS) * min(1, (t + 1) / 10)
    assert rates[t] == pytest.approx(want, rel=1e-6)
  assert rates[150] / rates[149] == pytest.approx(1.5 / 2.4, rel=0.01)
  assert rates[STEPS] == 0
  decays = np.array(values(trilm.decay))
  assert (decays[:200] == np.float32(0.1)).all() and not decays[200:].any()


def test_cosine_warms_up_falls_to_its_fraction_and_decays_throughout():
  cosine = schedule.CosineSchedule(4e-4, warmup_steps=20)
  rates = values(cosine.learning_rate)
  for t in range(20):
    assert rates[t] == pytest.approx(4e-4 * (t + 1) / 20, rel=1e-6)
  for t in range(20, STEPS + 1):
    angle = math.pi * (t - 20) / (STEPS - 20)
    want = 4e-4 * (0.1 + 0.9 * (1 + math.cos(angle)) / 2)
    assert rates[t] == pytest.approx(want, rel=1e-5)
  assert set(values(cosine.decay)) == {float(np.float32(0.1))}


@pytest.mark.parametrize(
  ('field', 'value'), [('peak', -1.0), ('peak', math.nan), ('drop_at', 1.5)]
)
def test_a_rate_that_cannot_be_is_refused(field, value):
  fields = {'peak': 1e-3, 'second_peak': 1e-3, 'warmup_steps': 1}
  with pytest.raises(ValueError, match=f'schedule.{field}={value}'):
    schedule.TriLMSchedule(**{**fields, field: value})
