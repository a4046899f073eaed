# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard

from tritera_jax import experiment as experiment_lib
from tritera_jax import experiment_file, show
from tritera_jax.data import shards
from tritera_jax.model import decoder, flops
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary.schedule import TriLMSchedule
from tritera_jax.train import step

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
    module = experiment_file.load_module(file)
    if hasattr(module, 'sweep'):
      yield from (f'{file}:{name}' for name in module.sweep())
    elif hasattr(module, 'experiment'):  # some train nothing
      yield str(file)


@pytest.mark.parametrize('path', list(every_experiment()))
def test_every_experiment_loads_and_has_the_shapes_it_counts(path):
  experiment = experiment_file.load(path)
  text = experiment_lib.to_json(experiment)
  assert experiment_lib.from_json(text) == experiment
  leaves = jax.tree.leaves(decoder.abstract_params(experiment.model))
  count = sum(leaf.size for leaf in leaves)
  assert count == flops.parameters(experiment.model)
  assert f'{count:,}' in show.describe(experiment)


@pytest.mark.parametrize('size', PAPER)
def test_the_nine_sizes_are_the_papers(size):
  parameters, float_gbit, ternary_gbit = PAPER[size]
  trilm = experiment_file.load(f'{SPECTRA}:trilm_{size}')
  floatlm = experiment_file.load(f'{SPECTRA}:floatlm_{size}')
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
  experiment = experiment_file.load(path)
  assert flops.parameters(experiment.model) == pytest.approx(count, rel=0.04)
  assert experiment.tokens == pytest.approx(1.2e12, rel=1e-5)


def test_a_wrong_name_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match=r'without .trilm_99.*trilm_99m'):
    experiment_file.load(f'{SPECTRA}:trilm_99')
  with pytest.raises(ValueError, match='is a sweep; name one'):
    experiment_file.load(SPECTRA)
  with pytest.raises(FileNotFoundError, match='no experiment file'):
    experiment_file.load('experiments/none.py')


def module(name):
  return experiment_file.load_module(FOLDER / f'{name}.py')


# Those whose parts no other test trains; a program takes seconds to compile.
@pytest.mark.parametrize('mini', [
  'bitnet_b158.py:mini_bitnet_b158_0',
  'bitnet_b158.py:mini_bitnet_2b4t_0',
])  # fmt: skip
def test_a_mini_trains(mini, tiny_data):
  experiment = experiment_file.load(f'{FOLDER}/{mini}')
  rows, length = experiment.data.batch_size, 32
  tokens = shards.open_split(tiny_data, 'train').read(0, rows * (length + 1))
  tokens = jnp.asarray(tokens, jnp.int32).reshape(rows, -1)
  # One device, for which programs compile in a third of the time.
  mesh = mesh_lib.make_mesh(experiment.mesh, jax.devices()[:1])
  with jax.set_mesh(mesh):
    update = step.jitted(experiment, mesh)
    state, losses = step.jitted_init(experiment, mesh)(), []
    for n in range(3):
      state, measured = update(state, tokens, n)
      losses.append(float(measured['loss']))
  vocabulary = experiment.model.padded_vocab_size
  assert losses[0] == pytest.approx(math.log(vocabulary), abs=0.5)
  assert losses[0] > losses[1] > losses[2]


def test_the_arms_of_the_schedule_ablation_are_the_papers():
  ablation = module('schedule_ablation')
  found = {}
  for name in ablation.ARMS:
    experiment = ablation.paper(name)
    assert experiment.tokens == pytest.approx(100e9, rel=1e-5)
    schedule, steps = experiment.optimizer.schedule, experiment.run.steps
    at = jnp.asarray([0.49, 0.51, 0.66, 0.67]) * steps
    # On the line to 0, and of the weight decay at first.
    left = schedule.learning_rate(at, steps) / (1 - at / steps)
    found[name] = [*np.round(left * 1e4, 1), *(schedule.decay(at, steps) > 0)]
  high, low, on, off = [13.0] * 4, [13.0, 9.0, 9.0, 9.0], [1] * 4, [1, 1, 1, 0]
  assert found == {
    'both': low + off,
    'only_decay': high + off,
    'only_rate': low + on,
    'neither': high + on,
  }


def test_the_mini_ablation_decays_weights_as_much_as_the_papers():
  ablation = module('schedule_ablation')

  def decayed(experiment):
    schedule, steps = experiment.optimizer.schedule, experiment.run.steps
    step = jnp.arange(steps)
    rates = schedule.learning_rate(step, steps)
    return float(jnp.sum(rates * schedule.decay(step, steps)))

  for arm in ablation.ARMS:
    mini, paper = ablation.mini(arm, 0), ablation.paper(arm)
    # But for warm-up, a tenth of the mini and a hundredth of the paper's.
    assert decayed(mini) == pytest.approx(decayed(paper), rel=0.15)


def test_continual_arms_go_on_from_each_other(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  continual = module('continual')
  arms = {arm: continual.mini(arm, 0) for arm in continual.ARMS}
  trunk, branch = arms['infinite'], arms['annealed_a']
  # As many updates on A as cosine_a's, and the trunk's up to its checkpoint.
  assert branch.run.steps == arms['cosine_a'].run.steps == 300
  assert trunk.data.schedule == ((0, (1, 0)), (300, (0, 1)))
  at = trunk.run.keep_every
  rates = [
    one.optimizer.schedule.learning_rate(jnp.arange(300), one.run.steps)
    for one in (trunk, branch)
  ]
  np.testing.assert_array_equal(rates[0][:at], rates[1][:at])
  assert (rates[0][at:] > rates[1][at:]).all()
  there = Path(trunk.run.folder) / 'checkpoints' / str(at)
  there.mkdir(parents=True)
  (there / 'state').write_text('bits')
  continual.branch(trunk, branch)
  copy = Path(branch.run.folder) / 'checkpoints' / str(at) / 'state'
  assert copy.read_text() == 'bits'

  rewarmed = arms['rewarmed']
  assert rewarmed.run.start_from == arms['cosine_a'].run.folder
  assert rewarmed.data.path == continual.CORPORA[1]
  assert arms['scratch'].tokens == trunk.tokens == 2 * rewarmed.tokens


def test_slimpajama_is_the_paper_s_sample_and_is_split_by_subset(tmp_path):
  slimpajama = module('slimpajama')
  # Spectra, 3.1: billions of tokens of 300.
  billions = [156, 80, 16, 13, 13, 12, 10]
  data = slimpajama.sweep()['trilm_3.9b'].data
  assert [weight for _, weight in data.mixture] == billions
  assert sum(billions) == 300

  names = [name for name, _, _ in slimpajama.SUBSETS.values()]
  lines = [
    {'text': f'{n}', 'meta': {'redpajama_set_name': names[n % 3]}}
    for n in range(7)
  ]
  file = tmp_path / 'in' / 'train' / 'chunk1' / 'example_0.jsonl.zst'
  file.parent.mkdir(parents=True)
  with zstandard.open(file, 'wt') as opened:
    opened.write(''.join(json.dumps(line) + '\n' for line in lines))
  for _ in range(2):
    slimpajama.split(tmp_path / 'in', tmp_path / 'out')
  text = {}
  for subset in ('commoncrawl', 'c4', 'github'):
    place = tmp_path / 'out' / 'train' / subset
    with zstandard.open(place / 'chunk1-example_0.jsonl.zst', 'rt') as opened:
      text[subset] = [json.loads(line)['text'] for line in opened]
  assert text == {
    'commoncrawl': ['0', '3', '6'], 'c4': ['1', '4'], 'github': ['2', '5'],
  }  # fmt: skip
