# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tritera_jax.scaling.costs import Growth, Serving, Shapes
from tritera_jax.scaling.runs import Run

# Spectra, Tables 3 and 4: hidden, GLU, layers; bits of FloatLM
# and of TriLM in 1e9. Layers have 4 h^2 + 3 h GLU weights, embedding and head
# 50277 h each.
SPECTRA = {
  99.74e6: (512, 1280, 16, 1.60, 0.90),
  569.2e6: (1280, 3072, 24, 9.11, 2.76),
  3989e6: (3072, 9216, 30, 63.83, 10.76),
}


def runs() -> list[Run]:
  return [
    Run(
      name=str(size), family='ternary', parameters=body + 2 * 50277 * h,
      parameters_without_embeddings=body, bits=1.0, tokens=100,
      flops=600.0 * (body + 50277 * h), held_out_loss=3.0,
      bits_per_byte=1.0, seed=0, seconds=1.0,
    )
    for size, (h, glu, layers, _, _) in SPECTRA.items()
    for body in [layers * (4 * h * h + 3 * h * glu)]
  ]  # fmt: skip


@pytest.mark.parametrize('counted', ['all', 'without_embeddings'])
def test_bytes_are_those_of_spectra_s_table(counted):
  shapes = Shapes.of_runs(runs(), counted)
  serving = Serving(ternary_bits=1.58)
  for run, (_, _, _, float_bits, ternary_bits) in zip(
    runs(), SPECTRA.values(), strict=True
  ):
    N = (
      run.parameters if counted == 'all' else run.parameters_without_embeddings
    )
    assert float(shapes.body(N)) == pytest.approx(
      run.parameters_without_embeddings, rel=0.05
    )
    for family, bits in (('float', float_bits), ('ternary', ternary_bits)):
      served = 8 * float(serving.bytes(family, shapes, N))
      assert served == pytest.approx(1e9 * bits, rel=0.05)
  # Embeddings follow a power law of the rest to this accuracy, here.
  assert shapes.embeddings.worst < 0.05
  assert 0.35 < shapes.embeddings.exponent < 0.45
  # The table says 6 for each weight that multiplies: the rest and the head.
  assert shapes.flops_per_body == pytest.approx(6.0)
  assert shapes.flops_per_embedding == pytest.approx(3.0)
  assert float(shapes.flops_per_token(1e15)) == pytest.approx(6e15, rel=1e-3)


def test_the_largest_model_within_a_limit_costs_the_limit():
  shapes = Shapes.of_runs(runs(), 'all')
  serving = Serving()

  def cost(N):
    return serving.bytes('ternary', shapes, N)

  N = shapes.invert(cost, [1e8, 1e9, 1e11])
  np.testing.assert_allclose(cost(N), [1e8, 1e9, 1e11], rtol=1e-4)


def test_energy_by_hand():
  # A body of 1000 weights, 200 in embedding and head, half of them read.
  shapes = Shapes('without_embeddings', Growth(0.2, 1.0))
  serving = Serving(
    ternary_bits=2.0, embedding_bits=8.0, joules_per_byte=10.0,
    joules_per_add=1.0, joules_per_multiply_add=3.0,
  )  # fmt: skip
  # 1000 * 2 / 8 + 100 * 8 / 8 = 350 bytes; 1000 adds; 100 multiply-adds.
  joules = serving.joules_per_token('ternary', shapes, 1000.0)
  assert float(joules) == pytest.approx(3500 + 1000 + 300)
  # 1000 * 16 / 8 + 100 = 2100 bytes; 1100 multiply-adds.
  joules = serving.joules_per_token('float', shapes, 1000.0)
  assert float(joules) == pytest.approx(21_000 + 3300)
  # Ten tokens at once share the reading, not the arithmetic.
  many = Serving(
    ternary_bits=2.0, embedding_bits=8.0, joules_per_byte=10.0,
    joules_per_add=1.0, joules_per_multiply_add=3.0, batch_size=10,
  )  # fmt: skip
  joules = many.joules_per_token('ternary', shapes, 1000.0)
  assert float(joules) == pytest.approx(350 + 1000 + 300)


def test_reading_a_float_model_takes_ten_times_the_energy_of_base_three():
  # Without embeddings and arithmetic: 16 / 1.6 bits.
  shapes = Shapes('all')
  few = Serving(joules_per_add=1e-30, joules_per_multiply_add=1e-30)
  float_joules, ternary_joules = (
    float(few.joules_per_token(family, shapes, 1e9))
    for family in ('float', 'ternary')
  )
  assert float_joules / ternary_joules == pytest.approx(10)
  # 1e9 weights of 16 bits at 4 pJ a bit.
  assert float_joules == pytest.approx(1e9 * 16 * 4e-12)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'ternary_bits': 0.0}, 'ternary_bits=0.0 must be > 0'),
    ({'embedding_read': 1.5}, 'embedding_read=1.5 must be <= 1'),
  ],
)
def test_assumptions_without_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Serving(**fields)
