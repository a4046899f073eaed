# SPDX-License-Identifier: Apache-2.0
"""Exports to Hugging Face, beside checkpoints that transformers wrote.

`test_transformers` loads exports where transformers is.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import tiny
from tests.interop import runs
from tests.interop.huggingface.test_golden import checkpoint
from tritera_jax.checkpoint import pack, restore
from tritera_jax.cli import main
from tritera_jax.interop import verify
from tritera_jax.interop.huggingface import importing, to_huggingface
from tritera_jax.ternary import latents

# config.json fields that transformers writes and that mean something.
_MEANT = [
  'architectures', 'model_type', 'hidden_size', 'intermediate_size',
  'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
  'head_dim', 'hidden_act', 'max_position_embeddings', 'rms_norm_eps',
  'tie_word_embeddings', 'vocab_size',
]  # fmt: skip


def tensors(folder) -> dict[str, np.ndarray]:
  found = {}
  for file in sorted(folder.glob('model*.safetensors')):
    found |= load_file(file)
  return found


@pytest.mark.parametrize(
  ('case', 'how'),
  [
    ('llama', {'shard_bytes': 100_000}),
    ('llama_grouped', {'dtype': 'bfloat16'}),
    ('trilm_3', {'dtype': 'float16'}),
    ('qwen3', {'dtype': 'bfloat16'}),
    ('bitnet', {'dtype': 'bfloat16', 'form': 'packed'}),
    ('bitnet_online', {'dtype': 'bfloat16', 'form': 'latents'}),
  ],
)
def test_what_transformers_wrote_is_written_again(case, how, tmp_path):
  source = checkpoint(case, tmp_path / 'source')
  importing.import_run(source, tmp_path / 'run')
  to_huggingface.export(tmp_path / 'run', tmp_path / 'out', **how)
  wanted, found = tensors(source), tensors(tmp_path / 'out')
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    assert found[name].dtype == array.dtype, name
    # As numbers: some zeros of a ternarised matrix are negative there.
    np.testing.assert_array_equal(found[name], array, name)
  theirs, ours = (
    json.loads((folder / 'config.json').read_text())
    for folder in (source, tmp_path / 'out')
  )
  default = {'head_dim': ours['head_dim']}  # BitNet's has none
  assert [ours[k] for k in _MEANT] == [(default | theirs)[k] for k in _MEANT]
  assert ours['rope_theta'] == theirs['rope_parameters']['rope_theta']
  files = sorted(tmp_path.glob('out/model*.safetensors'))
  if case == 'llama':
    index = json.loads(
      (tmp_path / 'out/model.safetensors.index.json').read_text()
    )
    assert len(files) > 1 and all(f.stat().st_size < 110_000 for f in files)
    assert index['metadata']['total_size'] == sum(
      a.nbytes for a in found.values()
    )
    for file in files:
      for name in load_file(file):
        assert index['weight_map'].pop(name) == file.name
    assert not index['weight_map']
  else:
    assert [file.name for file in files] == ['model.safetensors']


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_orbax_and_back(dtype, tiny_run, tmp_path):
  """float32 keeps codes and scales to the bit; less keeps the codes."""
  report = to_huggingface.export(tiny_run, tmp_path / 'hf', dtype=dtype)
  importing.import_run(tmp_path / 'hf', tmp_path / 'again')
  made = []
  for folder in (tiny_run, tmp_path / 'again'):
    experiment, params = restore.restore_params(folder)
    assert experiment.model == tiny.MODEL
    made.append(
      (
        pack.latent_fingerprint(experiment.model, params),
        list(pack.matrices(experiment.model, params)),
      )
    )
  (before, latent), (after, again) = made
  assert report.fingerprint == before
  assert (after == before) == (dtype == 'float32')
  steps = {'float32': 0, 'float16': 2**-11, 'bfloat16': 2**-8}[dtype]
  assert report.rounding <= steps
  for (name, codes, scale, _), (_, codes2, scale2, _) in zip(
    latent, again, strict=True
  ):
    np.testing.assert_array_equal(codes, codes2, name)
    np.testing.assert_allclose(scale, scale2, rtol=steps)
  assert ('rounded' in str(report)) == (dtype != 'float32')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_a_scale_without_latents_comes_back_as_the_nearest(
  dtype, tiny_data, tmp_path
):
  """Without a floor a float16 has none, for some shapes."""
  model = runs.shape(d_model=160, d_ff=256, heads=4, kv_heads=4, head_dim=40)
  params = runs.random_params(model)
  spread = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: (
      x * spread.uniform(0.3, 3, (x.shape[0], 1, 1)) if x.ndim == 3 else x
    ),
    params,
  )
  run = runs.make(tmp_path / 'run', tiny_data, model, params)
  exported = to_huggingface.export(run, tmp_path / 'out', dtype=dtype)
  report = importing.import_run(tmp_path / 'out', tmp_path / 'again')
  assert report.rounded
  assert 0 < report.ulps <= latents.MOST_ULPS
  experiment, params = restore.restore_params(tmp_path / 'again')
  assert not experiment.model.scale_floor
  made = pack.latent_fingerprint(experiment.model, params)
  assert made == report.fingerprint != exported.written
  same = verify.verify(tmp_path / 'out', tmp_path / 'again')
  assert (same.scales, same.fingerprint) == (dtype, exported.written)


def test_latents_are_not_rounded(tiny_data, tmp_path):
  fields = {'activation_bits': 8, 'scale_floor': True}
  run = runs.make(tmp_path / 'run', tiny_data, runs.shape(**fields))
  with pytest.raises(ValueError, match='latents that bfloat16 rounds'):
    to_huggingface.export(
      run, tmp_path / 'out', form='latents', dtype='bfloat16'
    )
  assert {path.name for path in tmp_path.iterdir()} == {'run'}
  report = to_huggingface.export(run, tmp_path / 'out', form='latents')
  assert report.fingerprint == report.written
  importing.import_run(tmp_path / 'out', tmp_path / 'again')
  there, here = (
    restore.restore_params(tmp_path / name)[1] for name in ('run', 'again')
  )
  jax.tree.map(np.testing.assert_array_equal, there, here)


def test_card_says_what_the_run_says(tiny_run, tmp_path):
  to_huggingface.export(
    tiny_run, tmp_path / 'TinyLM', step=10, licence='apache-2.0'
  )
  card = (tmp_path / 'TinyLM/README.md').read_text()
  assert card.startswith('---\n')
  header = dict(
    line.split(': ', 1) for line in card.split('---\n')[1].splitlines()
  )
  assert json.loads(header['license']) == 'apache-2.0'
  assert json.loads(header['library_name']) == 'transformers'
  records = [
    json.loads(line)
    for line in (tiny_run / 'metrics.jsonl').read_text().splitlines()
  ]
  [at] = [r for r in records if r['step'] == 10]
  assert f'{at["loss"]:.4f} nats' in card
  assert f'{at["held_out_loss"]:.4f} nats' in card
  assert '2,560: 10 steps of 8 x 32' in card  # tokens
  assert 'tiny_data' in card and 'Qwen3ForCausalLM' in card
  assert str(tmp_path) not in card and '/tiny_data' not in card
  assert re.search('`trits1:[0-9a-f]{64}`', card)


def test_card_of_an_import_claims_no_training(tmp_path):
  source = checkpoint('trilm_2', tmp_path / 'source')
  importing.import_run(source, tmp_path / 'run')
  to_huggingface.export(tmp_path / 'run', tmp_path / 'out')
  card = (tmp_path / 'out/README.md').read_text()
  assert 'imported from | source' in card and 'not recorded' in card
  assert 'license: "unknown"' in card and ' steps of ' not in card


IDS = {'bos_token_id': 5, 'eos_token_id': [7, 8], 'pad_token_id': 9}
KEPT = {
  'generation_config.json': json.dumps({**IDS, 'temperature': 0.6}),
  'tokenizer_config.json': '{"chat_template": "{{ messages }}"}',
  'special_tokens_map.json': '{"eos_token": "c"}',
  'chat_template.jinja': '{{ bos_token }}{{ messages }}',
}


@pytest.mark.parametrize('names', [[*KEPT], []])
def test_special_tokens_and_templates_come_back(names, tmp_path):
  source = checkpoint('trilm_2', tmp_path / 'source')
  config = json.loads((source / 'config.json').read_text())
  (source / 'config.json').write_text(json.dumps(config | IDS))
  for name in names:
    (source / name).write_text(KEPT[name])
  run, out = str(tmp_path / 'run'), tmp_path / 'out'
  assert main(['import', str(source), '--out', run]) == 0
  assert main(['export', run, '--to', 'hf', '--out', str(out)]) == 0
  there = json.loads((out / 'config.json').read_text())
  assert {name: there[name] for name in IDS} == IDS
  for name in names:
    assert (out / name).read_bytes() == KEPT[name].encode()
  if names:
    return
  made = json.loads((out / 'generation_config.json').read_text())
  assert made == {**IDS, 'do_sample': False}
  vocabulary = json.loads((source / 'tokenizer.json').read_text())
  words = {n: word for word, n in vocabulary['model']['vocab'].items()}
  made = json.loads((out / 'tokenizer_config.json').read_text())
  for name, id in (('bos', 5), ('eos', 7), ('pad', 9)):
    assert made[f'{name}_token'] == words[id]
  assert not (out / 'special_tokens_map.json').exists()


@pytest.mark.parametrize(
  ('fields', 'how', 'words'),
  [
    ({'input_norm': True}, {}, 'model.input_norm=true'),
    ({'sub_norm': True, 'qk_norm': True}, {}, 'model.qk_norm=true'),
    ({}, {'form': 'packed'}, 'activation_bits=None'),
    (
      {'activation_bits': 8, 'scale_blocks': 2},
      {'form': 'packed'},
      'model.scale_blocks=2',
    ),
    ({'vocab_size': 300}, {}, 'ids up to 383, and model.vocab_size=300'),
  ],
)
def test_refusals(fields, how, words, tiny_data, tmp_path):
  run = tmp_path / 'run'
  runs.describe(run, tiny_data, runs.shape(**fields))
  with pytest.raises(ValueError) as refused:
    to_huggingface.export(run, tmp_path / 'out', **how)
  assert words in str(refused.value)
  assert [path.name for path in tmp_path.iterdir()] == ['run']


@pytest.mark.parametrize(
  ('value', 'words'),
  [
    (70_000.0, 'norm has a weight of 70000.0, which float16 cannot hold; give'),
    (np.nan, 'norm has a weight of nan'),
  ],
)
def test_what_float16_cannot_hold(value, words, tiny_data, tmp_path):
  model = runs.shape()
  params = runs.random_params(model)
  params['norm']['scale'] = jnp.full((model.d_model,), value)
  run = runs.make(tmp_path / 'run', tiny_data, model, params)
  with pytest.raises(ValueError, match=words):
    to_huggingface.export(run, tmp_path / 'out', dtype='float16')
  assert [path.name for path in tmp_path.iterdir()] == ['run']


def test_verb(tiny_run, tmp_path, capsys):
  out = tmp_path / 'hf'
  command = ['export', str(tiny_run), '--to', 'hf', '--out', str(out)]
  assert main([*command, '--dtype', 'bfloat16']) == 0
  said = capsys.readouterr().out
  assert 'Qwen3ForCausalLM of step 20, bfloat16' in said
  assert 'rounded to bfloat16' in said
  assert main(command) == 1
  assert 'is there already' in capsys.readouterr().err
  command[-1] += '2'
  assert main([*command, '--step', '3']) == 1
  assert 'has no checkpoint of step 3' in capsys.readouterr().err
  assert not list(tmp_path.glob('hf2*'))


def test_documents_are_noted(tiny_data, tmp_path):
  model = dataclasses.replace(runs.shape(), document_separator=0)
  run = runs.make(tmp_path / 'run', tiny_data, model)
  report = to_huggingface.export(run, tmp_path / 'out')
  assert 'attention did not cross documents' in str(report)
