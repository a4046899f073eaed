# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import checkpoints
from tritera_jax import cli
from tritera_jax.checkpoint import packed_file
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.generate import load
from tritera_jax.interop import verify
from tritera_jax.interop.huggingface import importing
from tritera_kernels import packed


def written(folder, kind, change=lambda found: None):
  found = checkpoints.tensors(kind)
  change(found)
  return checkpoints.write(folder, checkpoints.KINDS[kind], found, shards=3)


@pytest.mark.parametrize('format', ['two_bit', 'base_three'])
@pytest.mark.parametrize('kind', ['trilm_2', 'bitlinear', 'bitnet'])
def test_packed_weights_are_those_of_the_checkpoint(
  kind, format, tmp_path, capsys
):
  """Reciprocals too, which no latents hold to the bit."""
  source = written(tmp_path / 'hf', kind)
  out = tmp_path / 'packed'
  said = ['pack', str(source), '--format', format, '--head', 'float']
  assert cli.main([*said, '--out', str(out)]) == 0
  assert 'bits/weight' in capsys.readouterr().out
  model = packed_file.read(out)
  int8 = kind != 'trilm_2'
  assert model.activations == ('int8' if int8 else 'float')
  found = checkpoints.tensors(kind)
  names = zip(model.config.linears, checkpoints.LINEARS, strict=True)
  for ours, theirs in names:
    spec = model.config.linears[ours]
    for layer in range(checkpoints.L):
      matrix = model.matrices[f'layers.{layer}.{ours}']
      codes_NK, scale_S = map(np.asarray, packed.unpack(matrix))
      axis = {'out': 0, 'in': 1}[spec.scale_axis]
      scales = np.repeat(scale_S, codes_NK.shape[axis] // len(scale_S))
      values = codes_NK * (scales[None] if axis else scales[:, None])
      want = checkpoints.weight(kind, found, f'model.layers.{layer}.{theirs}')
      np.testing.assert_array_equal(values, want.astype(np.float32))
  head = found.get('lm_head.weight', found['model.embed_tokens.weight'])
  rest = {
    'head': head.T,
    'layers.1.mlp_norm': found[
      'model.layers.1.post_attention_layernorm.weight'
    ],
  }
  if kind == 'bitnet':
    rest['layers.1.mlp.sub_norm'] = found[
      'model.layers.1.mlp.ffn_sub_norm.weight'
    ]
  for name, want in rest.items():
    np.testing.assert_array_equal(model.rest[name], want.astype('f'))
  verify.verify(source, out)


def test_it_scores_as_the_import_does(tmp_path):
  """By another way to the same logits: latents, quantised as in training."""
  source = written(tmp_path / 'hf', 'trilm_2')
  importing.import_run(source, tmp_path / 'run')
  out = tmp_path / 'packed'
  assert cli.main(['pack', str(source), '--out', str(out)]) == 0
  tokens = jnp.arange(12)[None]
  want, _ = load.load(tmp_path / 'run').model(tokens)
  got, _ = load.load(out, cache='float32').model(tokens)
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def nan(found):
  name = 'model.layers.1.mlp.down_proj.weight_scale'
  found[name] = np.full(1, np.nan, np.float32)


@pytest.mark.parametrize(
  'kind, change, words',
  [
    ('llama', lambda found: None, 'is of a FloatLM, which cannot be packed'),
    ('bitlinear', nan, 'down_proj.weight_scale is nan'),
    (
      'trilm_2',
      lambda found: found.pop('model.norm.weight'),
      'model.norm.weight is missing',
    ),
  ],
)
def test_what_cannot_be_packed_leaves_nothing(
  kind, change, words, tmp_path, capsys
):
  source = written(tmp_path / 'hf', kind, change)
  out = tmp_path / 'packed'
  assert cli.main(['pack', str(source), '--out', str(out)]) != 0
  assert words in capsys.readouterr().err
  assert {path.name for path in tmp_path.iterdir()} == {'hf'}


def test_a_folder_to_make_has_to_be_named(tmp_path, capsys):
  source = written(tmp_path / 'hf', 'trilm_2')
  assert cli.main(['pack', str(source)]) != 0
  assert '--out' in capsys.readouterr().err
  missing = ['pack', 'owner/name', '--out', str(tmp_path / 'packed')]
  assert cli.main(missing) != 0
  assert 'of the hub it is called hf://owner/name' in capsys.readouterr().err


def test_documents_end_as_config_json_says(tmp_path):
  settings = {**checkpoints.KINDS['trilm_2'], 'eos_token_id': 5}
  found = checkpoints.tensors('trilm_2')
  source = checkpoints.write(tmp_path / 'hf', settings, found)
  out = tmp_path / 'packed'
  assert cli.main(['pack', str(source), '--out', str(out)]) == 0
  loaded = load.load(out)
  assert tokenizer_lib.end_of_text_id(loaded.tokenizer, out) == 5
