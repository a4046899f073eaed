# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import checkpoints
from tests.train.test_start import starting
from tritera_jax import cli
from tritera_jax.checkpoint import restore, save
from tritera_jax.data import loader, shards, tokenizer
from tritera_jax.generate import load
from tritera_jax.interop.gguf import gguf_file
from tritera_jax.interop.huggingface import architectures, importing
from tritera_jax.model import decoder, quantized
from tritera_jax.train import start

TERNARY = ('trilm', 'trilm_2', 'bitnet', 'bitlinear')
WEIGHTS = {
  'llama': 'float', 'qwen3': 'float', 'bitnet_master': 'latents',
  'b1_58': 'latents', **dict.fromkeys(TERNARY, 'ternary'),
}  # fmt: skip
GATE = 'model.layers.1.mlp.gate_proj.weight'


def imported(tmp_path, kind, *, change=None, settings=None, **options):
  """A checkpoint of a kind, after `change`, as a run's folder."""
  found = checkpoints.tensors(kind)
  if change is not None:
    change(found)
  source = checkpoints.write(
    tmp_path / 'hf', {**checkpoints.KINDS[kind], **(settings or {})}, found
  )
  return importing.import_run(source, tmp_path / 'run', **options)


@pytest.mark.parametrize('kind', checkpoints.KINDS)
def test_a_run_holds_the_tensors_of_the_checkpoint(kind, tmp_path):
  """To the bit; test_golden compares what is computed of them."""
  found = checkpoints.tensors(kind)
  source = checkpoints.write(
    tmp_path / 'hf', checkpoints.KINDS[kind], found, shards=3
  )
  report = importing.import_run(source, tmp_path / 'run')
  assert report.weights == WEIGHTS[kind]
  settings, params = restore.restore_params(tmp_path / 'run')
  equal = np.testing.assert_array_equal
  embed = found['model.embed_tokens.weight'].astype('f')
  equal(params['embed']['embedding'], embed)
  head = found.get('lm_head.weight', embed).astype('f')
  equal(params['head']['kernel'], head.T)
  gain = found['model.layers.1.post_attention_layernorm.weight']
  equal(params['layers']['mlp_norm']['scale'][1], gain.astype('f'))
  if settings.model.sub_norm:
    name = 'inner_attn_ln' if kind == 'b1_58' else 'attn_sub_norm'
    gain = found[f'model.layers.1.self_attn.{name}.weight']
    equal(params['layers']['attention']['sub_norm']['scale'][1], gain)
  latents = quantized.latents(settings.model, params)
  for name, theirs in zip(latents, checkpoints.LINEARS, strict=True):
    for layer in range(checkpoints.L):
      values = checkpoints.weight(kind, found, f'model.layers.{layer}.{theirs}')
      if kind not in TERNARY:
        equal(latents[name][layer].T, values.astype('f'))
  if kind in TERNARY:
    same_codes_and_scales(kind, found, settings.model, params)


def same_codes_and_scales(kind, found, model, params):
  for (name, (codes, scale)), theirs in zip(
    quantized.codes_and_scales(model, params).items(),
    checkpoints.LINEARS,
    strict=True,
  ):
    axis = int(model.linears[name].scale_axis == 'in')
    for layer in range(model.layers):
      values = checkpoints.weight(kind, found, f'model.layers.{layer}.{theirs}')
      np.testing.assert_array_equal(codes[layer].T, np.sign(values))
      parts = np.split(values, model.scale_blocks, axis)
      want = np.array([np.abs(part).max() for part in parts])
      # A reciprocal is rounded, and may have no latents of its own.
      ulps = 2 if kind == 'bitlinear' else 0
      np.testing.assert_allclose(
        scale[layer], want.astype('f'), rtol=ulps * 2.0**-23
      )


def test_scales_of_a_matrix_are_those_of_its_blocks(tmp_path):
  report = imported(tmp_path, 'trilm_2')
  assert report.rounded == 0
  model = save.read_experiment(tmp_path / 'run').model
  assert (model.scale_blocks, model.scale_floor) == (2, True)
  assert model.padded_vocab_size == checkpoints.V


def test_a_block_of_zeros_has_no_scale_to_keep(tmp_path):
  def change(found):
    found[GATE][: checkpoints.F // 2] = 0

  imported(tmp_path, 'trilm_2', change=change)
  settings, params = restore.restore_params(tmp_path / 'run')
  codes, scale = quantized.codes_and_scales(settings.model, params)['mlp.gate']
  assert not np.any(codes[1, :, : checkpoints.F // 2])
  np.testing.assert_array_equal(scale[1, 0], np.float32(1e-5))


def test_any_floats_can_be_latents(tmp_path):
  report = imported(tmp_path, 'llama', weights='latents')
  assert report.fingerprint.startswith('trits1:')
  settings, params = restore.restore_params(tmp_path / 'run')
  assert settings.model.family == 'ternary'
  assert not settings.model.scale_floor
  np.testing.assert_array_equal(
    params['layers']['mlp']['gate']['kernel'][1].T,
    checkpoints.tensors('llama')[GATE].astype('f'),
  )


def test_int8_activations_that_no_file_speaks_of(tmp_path):
  """As the latents of Falcon-E lie: a plain Llama by its config.json."""
  imported(tmp_path, 'llama', weights='latents', activation_bits=8)
  model = save.read_experiment(tmp_path / 'run').model
  assert (model.activation_bits, model.scale_floor) == (8, True)
  # The same as what says so of itself.
  stated = {'quantization_config': {
    **checkpoints.BITNET, 'linear_class': 'autobitlinear',
    'quantization_mode': 'online',
  }}  # fmt: skip
  imported(tmp_path / 'stated', 'llama', settings=stated)
  assert model == save.read_experiment(tmp_path / 'stated/run').model


def test_a_float_model_rounds_no_activations(tmp_path):
  with pytest.raises(ValueError, match='activation_bits=8 is of ternary'):
    imported(tmp_path, 'llama', activation_bits=8)
  assert not (tmp_path / 'run').exists()


def test_a_bitnet_without_a_word_of_it_is_what_the_user_says(tmp_path):
  plain = {'quantization_config': None}
  for name, weights, bits in (('a', 'latents', 8), ('b', 'float', None)):
    report = imported(
      tmp_path / name, 'bitnet_master', settings=plain, weights=weights,
      activation_bits=bits,
    )  # fmt: skip
    assert report.weights == weights
    model = save.read_experiment(tmp_path / name / 'run').model
    assert (model.family == 'ternary', model.activation_bits) == (
      weights == 'latents', bits,
    )  # fmt: skip


def test_matrices_that_differ_are_what_the_user_says(tmp_path):
  def change(found):
    found['model.layers.0.self_attn.q_proj.weight'] = np.eye(48, dtype='f')

  imported(tmp_path, 'llama', change=change, weights='float')
  assert save.read_experiment(tmp_path / 'run').model.family == 'float'


def put(name, place, value):
  def change(found):
    found[name] = found[name].copy()
    found[name][place] = value

  return change


def drop(name):
  return lambda found: found.pop(name)


def replaced(name, value):
  return lambda found: found.update({name: value})


SCALE = 'model.layers.1.mlp.gate_proj.weight_scale'
REFUSED = {
  'value': (
    'trilm', put(GATE, (5, 7), 0.4), {},
    r'1.mlp.gate_proj.weight: .*: 0.3999\d+ at \[5, 7\] is neither 0 nor',
  ),
  'scales': (
    'trilm_2', None, {'settings': {'pretraining_model_parallel': 1},
                      'weights': 'ternary'},
    'q_proj.weight: its values are not ternary: .* with 1 scale a matrix',
  ),
  'code': (
    'bitnet', put(GATE, (3, 7), 0b11000000), {},
    'gate_proj.weight: the code of output 75, input 7 is 3',
  ),
  'nan': (
    'llama', put(GATE, (5, 7), np.nan), {},
    r'hf/model.safetensors: .*gate_proj.weight: the value at \[5, 7\] is nan',
  ),
  'infinite gain': (
    'llama', put('model.norm.weight', 3, np.inf), {},
    r'model.norm.weight: the value at \[3\] is inf',
  ),
  'nan scale': ('bitnet', put(SCALE, 0, np.nan), {}, 'weight_scale is nan'),
  'zero scale': ('bitlinear', put(SCALE, 0, 0), {}, 'weight_scale is 0'),
  'negative scale': ('bitnet', put(SCALE, 0, -1), {}, 'weight_scale is -1'),
  'missing': ('llama', drop(GATE), {}, 'gate_proj.weight is missing'),
  'extra': (
    'llama', replaced('model.layers.0.self_attn.q_proj.bias', np.ones(48)), {},
    'self_attn.q_proj.bias is extra',
  ),
  'shape': (
    'llama', replaced(GATE, np.ones((95, 48), 'f')), {},
    r'gate_proj.weight is F32\[95, 48\], by config.json \[96, 48\]',
  ),
  'bytes': (
    'llama', replaced(GATE, np.ones((24, 48), 'u1')), {},
    "is U8, without a quantization_config of quant_method 'bitnet'",
  ),
  'bytes of latents': (
    'bitnet', None, {'settings': {'quantization_config': {
      **checkpoints.BITNET, 'linear_class': 'autobitlinear',
      'quantization_mode': 'online'}}},
    r"packed bytes \(U8\), and by .* are latents; set quantization_mode='offl",
  ),
  'reciprocals': (
    'bitlinear', None, {'settings': {'quantization_config': {
      **checkpoints.BITNET, 'linear_class': 'autobitlinear'}}},
    "by linear_class='autobitlinear' .* 1[0-9].* by 'bitlinear' they are 0.0",
  ),
  'no reciprocals': (
    'bitnet', None, {'settings': {'quantization_config': checkpoints.BITNET}},
    "by linear_class='bitlinear' .* by 'autobitlinear' they are 0.0",
  ),
  'BitNet that says nothing': (
    'bitnet_master', None, {'settings': {'quantization_config': None}},
    'has no quantization_config .* give weights .--weights latents',
  ),
  'floats among ternary': (
    'trilm', replaced(GATE, np.random.default_rng(0).normal(size=(96, 48))),
    {}, r'0.self_attn.q_proj.weight is ternary, and .*hf/model.safetensors: '
    r'.*1.mlp.gate_proj.weight is not: give weights',
  ),
  'ternary among floats': (
    'llama', replaced('model.layers.0.self_attn.q_proj.weight',
                      np.eye(48, dtype='f')), {},
    'q_proj.weight is ternary, and .*0.self_attn.k_proj.weight is not: give',
  ),
  'some bytes': (
    'bitnet', replaced(GATE, np.ones((96, 48), 'f')), {},
    'some matrices are of packed bytes',
  ),
  'no scale': ('bitnet', drop(SCALE), {}, 'gate_proj.weight_scale is missing'),
  'scales a row': (
    'bitnet', replaced(SCALE, np.ones(96, 'f')), {},
    r'weight_scale has the shape \[96\], wanted one number',
  ),
  'layers': (
    'llama', None, {'settings': {'num_hidden_layers': 10**9}},
    'num_hidden_layers=1000000000, and there are 21 tensors',
  ),
  'head': (
    'llama', None, {'settings': {'tie_word_embeddings': True}},
    'tie_word_embeddings=true, and lm_head.weight is not',
  ),
  'vocabulary': (
    'llama', None, {'settings': {'vocab_size': 100}},
    r'model.embed_tokens.weight is F16\[384, 48\], by config.json \[100, 48\]',
  ),
  'latents of values': (
    'trilm', None, {'weights': 'latents'},
    "are 'ternary'; 'ternary' makes latents of exactly these values",
  ),
  'floats of bytes': (
    'bitnet', None, {'weights': 'float'}, "those of .*hf are 'ternary'",
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_wrong_is_named_and_leaves_nothing(case, tmp_path):
  kind, change, options, words = REFUSED[case]
  with pytest.raises(ValueError, match=words):
    imported(tmp_path, kind, change=change, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['hf']


def test_tokenizers_are_compared_with_the_vocabulary(tmp_path):
  source = checkpoints.write(
    tmp_path / 'hf', checkpoints.KINDS['llama'], checkpoints.tensors('llama')
  )
  file = source / 'tokenizer.json'
  there = json.loads(file.read_text())
  count = len(there['model']['vocab'])
  there['model']['vocab'] |= {f'<{n}>': n for n in range(count, 385)}
  file.write_text(json.dumps(there))
  with pytest.raises(ValueError, match='id 384, and config.json says vocab_si'):
    importing.import_run(source, tmp_path / 'run')
  file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  with pytest.raises(ValueError, match=r'tokenizer.json is .* `git lfs pull`'):
    importing.import_run(source, tmp_path / 'run')
  file.unlink()
  with pytest.raises(FileNotFoundError, match='make it from another kind'):
    importing.import_run(source, tmp_path / 'run')


def test_an_interrupted_import_leaves_nothing_that_loads(tmp_path, monkeypatch):
  def stop(experiment, folder):
    # The last moment: a process that dies here leaves this folder.
    with pytest.raises(FileNotFoundError, match='is not a run folder'):
      restore.restore_params(folder)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(save, 'write_experiment', stop)
    with pytest.raises(KeyboardInterrupt):
      imported(tmp_path, 'trilm')
  assert [path.name for path in tmp_path.iterdir()] == ['hf']
  # What a killed one left is no hindrance; what is there is not touched.
  (tmp_path / 'run.tritera-partial' / 'staged').mkdir(parents=True)
  (tmp_path / 'run.partial').mkdir()  # somebody's
  imported(tmp_path, 'trilm')
  with pytest.raises(FileExistsError, match='is there already'):
    imported(tmp_path, 'trilm')
  assert {path.name for path in tmp_path.iterdir()} == {
    'hf', 'run', 'run.partial',
  }  # fmt: skip


def test_what_was_exported_here_comes_back_as_it_was(tmp_path):
  fingerprint = imported(tmp_path, 'trilm_2').fingerprint
  model = save.read_experiment(tmp_path / 'run').model
  settings = architectures.config_json(
    model, 'unpacked', dtype='float16', end_of_text=0, fingerprint=fingerprint
  )
  found = checkpoints.tensors('trilm_2')
  source = checkpoints.write(tmp_path / 'ours', settings, found)
  report = importing.import_run(source, tmp_path / 'again')
  assert report.fingerprint == fingerprint
  assert save.read_experiment(tmp_path / 'again').model == model
  found[GATE] = -found[GATE]
  checkpoints.write(source, settings, found)
  with pytest.raises(ValueError, match='since they were exported, delete'):
    importing.import_run(source, tmp_path / 'other')


@pytest.fixture(scope='module')
def speaking(tiny_data, tmp_path_factory):
  """An imported run with the tokenizer of a dataset, and what was said."""
  folder = tmp_path_factory.mktemp('speaking')
  source = checkpoints.write(
    folder / 'hf',
    checkpoints.KINDS['trilm_2'],
    checkpoints.tensors('trilm_2'),
    tokenizer=tiny_data / 'tokenizer.json',
  )
  said = io.StringIO()
  with contextlib.redirect_stdout(said):
    args = ['import', str(source), '--out', str(folder / 'run')]
    assert cli.main(args) == 0
  return folder / 'run', said.getvalue()


def test_verbs_take_an_imported_run(speaking, tiny_data, capsys):
  run, said = speaking
  assert 'LlamaForCausalLM, ternary weights, trits1:' in said
  assert cli.main(['eval', str(run)]) == 1
  assert 'name a dataset with --data' in capsys.readouterr().err
  assert cli.main(['eval', str(run), '--data', str(tiny_data)]) == 0
  assert cli.main(['pack', str(run)]) == 0
  assert said.split()[-1] in capsys.readouterr().out  # the fingerprint
  args = ['generate', str(run), '--prompt', 'def', '--new-tokens', '2']
  assert cli.main(args) == 0


@pytest.fixture
def turns(tmp_path):
  """A checkpoint whose documents end with a token of a name of its own."""
  source = checkpoints.write(
    tmp_path / 'hf', checkpoints.KINDS['trilm'], checkpoints.tensors('trilm')
  )
  file = source / 'tokenizer.json'
  file.write_text(file.read_text().replace(tokenizer.END_OF_TEXT, '<|turn|>'))
  return source


def test_a_config_says_which_token_ends_a_document(turns, tmp_path, capsys):
  file = turns / 'config.json'
  settings = json.loads(file.read_text())
  # The first that is a token: names alone would not say.
  settings['eos_token_id'] = [100_000, 0, 5]
  file.write_text(json.dumps(settings))
  run, packed = tmp_path / 'run', tmp_path / 'run/packed/two_bit'
  text = tmp_path / 'a.txt'
  text.write_text('one two')
  data, gguf = tmp_path / 'data', tmp_path / 'm.gguf'
  corpus = [str(text.parent / 'a.txt'), str(data), '--holdout', '0']
  for command in (
    ['import', str(turns), '--out', str(run)],
    ['pack', str(run)],
    ['eval', str(run), '--text', str(text)],
    ['generate', str(run), '--prompt', '', '--new-tokens', '2'],
    ['eval', str(packed), '--text', str(text)],
    ['prepare', *corpus, '--tokenizer', str(run / 'tokenizer.json')],
    ['export', str(run), '--to=gguf', '--types=f16', '--pre=gpt-2', '--out',
     str(gguf)],
  ):  # fmt: skip
    assert cli.main(command) == 0, capsys.readouterr().err
  for folder in (run, packed):
    assert load.load(folder).end_of_text == 0
  assert shards.read_manifest(data).end_of_text == 0
  assert gguf_file.read(gguf).value('tokenizer.ggml.eos_token_id', int) == 0
  # Another than a known name's, too.
  words = tokenizer.train_tokenizer(['a'], 300)
  (tmp_path / 'config.json').write_text('{"eos_token_id": 7}')
  assert tokenizer.end_of_text_id(words) == 0
  assert tokenizer.end_of_text_id(words, tmp_path) == 7


def test_where_nothing_says_so_the_advice_can_be_followed(
  turns, tmp_path, capsys
):
  run, text = tmp_path / 'run', tmp_path / 'a.txt'
  text.write_text('one two')
  assert cli.main(['import', str(turns), '--out', str(run)]) == 0
  command = ['eval', str(run), '--text', str(text)]
  assert cli.main(command) == 1
  said = capsys.readouterr().err
  assert f'to {run}/end_of_text.json, beside tokenizer.json: {{"id":' in said
  file = run / 'end_of_text.json'
  file.write_text('{"id": 100000}')
  assert cli.main(command) == 1
  assert 'id=100000 is no token' in capsys.readouterr().err
  file.write_text('{"id": 0}')
  assert cli.main(command) == 0


def test_training_goes_on_from_the_imported_loss(speaking, tiny_data, tmp_path):
  run, _ = speaking
  experiment = starting(
    tiny_data, tmp_path / 'next', run,
    qk_norm=False, scale_floor=True, vocab_multiple=1,
  )  # fmt: skip
  start.check(experiment, shards.read_tokenizer(tiny_data))
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  [params] = start.parameters(
    experiment,
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      decoder.abstract_params(experiment.model),
    ),
  )
  data = experiment.data
  batches = loader.batches(
    [shards.open_split(data.path, 'train')],
    data.schedule,
    batch_size=data.batch_size,
    sequence_length=data.sequence_length,
    seed=data.seed,
  )
  batch = next(iter(loader.iterate(batches, 0, prefetch=0)))
  tokens = jnp.asarray(batch['tokens'], jnp.int32)

  def loss(model):
    logs = jax.nn.log_softmax(model(tokens[:, :-1])[0])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], 2).mean()

  # As it is trained, quantised in the forward pass; and as it is used.
  got = loss(decoder.bind(experiment.model, params))
  np.testing.assert_allclose(got, loss(load.load(run).model), rtol=1e-5)
