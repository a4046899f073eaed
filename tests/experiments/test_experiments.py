# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import jax
import pytest

from tritera_jax import experiment as experiment_lib
from tritera_jax import show
from tritera_jax.model import decoder, flops
from tritera_jax.ternary.schedule import TriLMSchedule

FOLDER = Path(__file__).parents[2] / 'experiments'
SPECTRA = f'{FOLDER}/spectra.py'

# Spectra, Table 3 (parameters) and Table 4 (size in Gbit: FloatLM, TriLM).
PAPER = {
  '99m': (99.74e6, 1.60, 0.90),
  '190m': (190.0e6, 3.05, 1.42),
  '390m': (392.4e6, 6.28, 2.11),
  '560m': (569.2e6, 9.11, 2.76),
  '830m': (834.0e6, 13.34, 3.55),
  '1.1b': (1.149e9, 18.39, 4.42),
  '1.5b': (1.515e9, 24.23, 5.36),
  '2.4b': (2.461e9, 39.38, 7.23),
  '3.9b': (3.989e9, 63.83, 10.76),
}


def every_experiment():
  for file in sorted(FOLDER.glob('*.py')):
    module = experiment_lib._load_module(file)
    if hasattr(module, 'sweep'):
      yield from (f'{file}:{name}' for name in module.sweep())
    elif hasattr(module, 'experiment'):  # some train nothing
      yield str(file)


@pytest.mark.parametrize('path', list(every_experiment()))
def test_every_experiment_loads_and_has_the_shapes_it_counts(path):
  experiment = experiment_lib.load(path)
  text = experiment_lib.to_json(experiment)
  assert experiment_lib.from_json(text) == experiment
  leaves = jax.tree.leaves(decoder.abstract_params(experiment.model))
  count = sum(leaf.size for leaf in leaves)
  assert count == flops.parameters(experiment.model)
  assert f'{count:,}' in show.describe(experiment)


@pytest.mark.parametrize('size', PAPER)
def test_the_nine_sizes_are_the_papers(size):
  parameters, float_gbit, ternary_gbit = PAPER[size]
  trilm = experiment_lib.load(f'{SPECTRA}:trilm_{size}')
  floatlm = experiment_lib.load(f'{SPECTRA}:floatlm_{size}')
  # The paper prints 190.0M where its own Table 4 (3.05 Gbit) gives 190.5M.
  assert flops.parameters(trilm.model, padded=False) == pytest.approx(
    parameters, rel=3e-3 if size == '190m' else 5e-4
  )
  assert flops.size_bits(floatlm.model) / 1e9 == pytest.approx(
    float_gbit, abs=0.006
  )
  # 1.58 rounds log2(3) = 1.585.
  assert flops.size_bits(trilm.model) / 1e9 == pytest.approx(
    ternary_gbit, abs=0.007
  )
  assert trilm.data.batch_size * trilm.data.sequence_length == 2**20
  assert floatlm.data.batch_size * floatlm.data.sequence_length == 2**21
  assert isinstance(trilm.optimizer.schedule, TriLMSchedule)
  assert trilm.tokens == pytest.approx(300e9, rel=1e-5)


@pytest.mark.parametrize(('size', 'count'), [
  ('1.5b', 1.5e9), ('2.5b', 2.5e9), ('3.6b', 3.6e9),
])  # fmt: skip
def test_spectra_1_1_sizes_are_near_their_names(size, count):
  path = f'{FOLDER}/spectra_1_1.py:trilm_{size}'
  experiment = experiment_lib.load(path)
  assert flops.parameters(experiment.model) == pytest.approx(count, rel=0.04)
  assert experiment.tokens == pytest.approx(1.2e12, rel=1e-5)


def test_a_wrong_name_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match=r'without .trilm_99.*trilm_99m'):
    experiment_lib.load(f'{SPECTRA}:trilm_99')
  with pytest.raises(ValueError, match='is a sweep; name one'):
    experiment_lib.load(SPECTRA)
  with pytest.raises(FileNotFoundError, match='no experiment file'):
    experiment_lib.load('experiments/none.py')
