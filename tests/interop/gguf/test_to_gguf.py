# SPDX-License-Identifier: Apache-2.0
"""Exports, read by the `gguf` package and computed by a NumPy reading of ggml.

The golden files have been run by llama.cpp 0.3.36 of llama-cpp-python, whose
logits lie beside them.
"""

import dataclasses
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import gguf_golden
from tests.interop.gguf import ggml
from tests.interop.gguf_golden import LLAMA, QWEN3, VOCABULARY
from tests.model import oracle
from tritera_jax import cli
from tritera_jax.checkpoint import pack
from tritera_jax.data import prepare
from tritera_jax.interop.gguf import gguf_file, layout, tensor_plan, to_gguf
from tritera_kernels import fingerprint

IDS = gguf_golden.ids()


def replaced(config, **fields):
  return dataclasses.replace(config, **fields)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Of a config: its folder, made once."""
  made = {}

  def run(config, pieces='llama-3'):
    if (config, pieces) not in made:
      made[config, pieces] = gguf_golden.make_run(
        tmp_path_factory.mktemp('runs') / 'run',
        config,
        gguf_golden.random_params(config),
        pieces,
      )
    return made[config, pieces]

  return run


def relative(found, wanted) -> float:
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize('name', gguf_golden.GOLDEN)
def test_golden_files_are_what_llama_cpp_has_run(name, run, tmp_path):
  config, types = gguf_golden.GOLDEN[name]
  golden = gguf_golden.FOLDER / f'{name}.gguf'
  theirs = np.load(gguf_golden.FOLDER / f'{name}.npy')
  assert golden.stat().st_size < 300_000
  # llama.cpp rounds activations to int8.
  assert relative(ggml.logits(golden, IDS.tolist()), theirs) < 0.012
  file = tmp_path / 'again.gguf'
  to_gguf.export(
    run(config), file, types=types, embedding='q8_0', head='q8_0', name=name
  )
  old, new = gguf_file.read(golden), gguf_file.read(file)
  assert old.metadata.keys() == new.metadata.keys()
  for key, value in old.metadata.items():
    assert list(np.atleast_1d(value)) == list(np.atleast_1d(new.metadata[key]))
  assert list(old.tensors.items()) == list(new.tensors.items())
  for tensor in old.tensors:
    np.testing.assert_array_equal(old.rows(tensor), new.rows(tensor), tensor)


# Scales rounded to float16 are off by up to 2^-11 of themselves, embedding and
# head in q8_0 by up to 1 / 254 of a block's largest.
@pytest.mark.parametrize(
  'config, options, tolerance',
  [
    (LLAMA, {'types': 'f32', 'embedding': 'f32', 'head': 'f32'}, 1e-5),
    (LLAMA, {'types': 'tq2_0'}, 1e-3),
    (LLAMA, {'types': 'q2_0', 'embedding': 'bf16', 'head': 'q8_0'}, 1e-2),
    # o and down: 128 inputs a scale.
    (QWEN3, {'types': 'q2_0', 'embedding': 'f32', 'head': 'f32'}, 1e-3),
    (LLAMA, {'types': 'f16'}, 1e-3),
    (replaced(LLAMA, family='binary'), {'types': 'tq1_0'}, 1e-3),
    (replaced(LLAMA, family='float'), {'types': 'f16'}, 1e-3),
  ],
)
def test_the_file_computes_what_the_run_does(
  config, options, tolerance, run, tmp_path
):
  file = tmp_path / 'model.gguf'
  report = to_gguf.export(run(config), file, **options)
  found = ggml.logits(file, IDS.tolist())
  params = gguf_golden.random_params(config)
  assert relative(found, oracle.decoder(config, params, IDS)) < tolerance
  assert report.architecture == ('qwen3' if config.qk_norm else 'llama')
  if config.family == 'float':
    with pytest.raises(ValueError, match='FloatLM, which has no codes'):
      next(layout.read_matrices(gguf_file.read(file)))
    return
  latent = pack.latent_fingerprint(config, params)
  read = gguf_file.read(file)
  assert layout.read_config(read) == config
  assert latent == report.fingerprint
  assert latent == read.value('tritera.fingerprint', str)
  matrices = layout.read_matrices(read)
  assert fingerprint.trit_fingerprint(matrices) == latent


def test_a_head_that_is_the_embedding_is_written_once(tmp_path):
  config = replaced(LLAMA, family='float')
  params = gguf_golden.random_params(config)
  params['head']['kernel'] = params['embed']['embedding'].T
  run = gguf_golden.make_run(tmp_path / 'run', config, params, 'llama-3')
  wanted = oracle.decoder(config, params, IDS)
  for head in ('f16', 'f32'):
    file = tmp_path / f'{head}.gguf'
    to_gguf.export(run, file, types='f16', embedding='f16', head=head)
    there = gguf_file.read(file).tensors
    # In another type it is another.
    assert ('output.weight' in there) == (head == 'f32')
    assert 'token_embd.weight' in there
    assert relative(ggml.logits(file, IDS.tolist()), wanted) < 1e-3


def test_what_a_file_says_of_itself(run, tmp_path):
  file = tmp_path / 'model.gguf'
  to_gguf.export(
    run(LLAMA), file, types='tq2_0', name='Mine', licence='apache-2.0'
  )
  fields = ggml.reader(file).fields
  said = {key: fields[key].contents() for key in fields if '.' in key}
  assert said['general.architecture'] == 'llama'
  assert said['general.name'] == 'Mine'
  assert said['general.license'] == 'apache-2.0'
  assert said['general.file_type'] == 37  # LLAMA_FTYPE_MOSTLY_TQ2_0
  assert said['llama.vocab_size'] == VOCABULARY
  assert said['tokenizer.ggml.pre'] == 'llama-bpe'
  assert said['tokenizer.ggml.model'] == 'gpt2'
  assert len(said['tokenizer.ggml.tokens']) == VOCABULARY
  for name in ('bos', 'eos', 'eot'):
    assert said[f'tokenizer.ggml.{name}_token_id'] == 0
  assert said['tokenizer.ggml.add_bos_token'] is False
  assert said['tritera.step'] == 10


def test_a_tokenizer_without_a_rule_needs_one_named(run, tmp_path):
  folder, file = run(LLAMA, 'code'), tmp_path / 'model.gguf'
  with pytest.raises(ValueError, match='no rule .* name the nearest'):
    to_gguf.export(folder, file, types='tq2_0')
  assert not list(tmp_path.iterdir())
  report = to_gguf.export(folder, file, types='tq2_0', pre='llama-bpe')
  assert 'by how much: name a text with sample' in str(report)
  sample = tmp_path / 'sample.txt'
  sample.write_text('a\n    b\n')
  file.unlink()
  report = to_gguf.export(
    folder, file, types='tq2_0', pre='llama-bpe', sample=sample
  )
  assert re.search(r'\d % of the tokens of 8 characters of .*txt', str(report))


def test_the_sample_is_held_out_text_of_the_runs_dataset(tiny_data):
  text = to_gguf._sample(None, str(tiny_data))
  whole = prepare.decode_split(tiny_data, 'validation').decode()
  assert text and whole.startswith(text)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'mlp_activation': 'relu2'}, "mlp_activation='relu2' .* have silu"),
    ({'sub_norm': True}, "sub_norm=True .* 'bitnet' has them"),
    ({'input_norm': True}, 'input_norm=True .* no architecture'),
    ({'activation_bits': 8}, 'activation_bits=8 .* not by tokens'),
  ],
)
def test_models_that_no_architecture_computes_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    to_gguf.check_expressible(replaced(LLAMA, **changes))


@pytest.mark.parametrize(
  'options, message',
  [
    ({'end': '</s>'}, "end='</s>' is no token"),
    ({'step': 3}, 'no checkpoint of step 3'),
  ],
)
def test_what_is_not_in_the_run_is_refused(options, message, run, tmp_path):
  file = tmp_path / 'out' / 'model.gguf'
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    to_gguf.export(run(LLAMA), file, types='tq2_0', **options)
  assert not (tmp_path / 'out').exists()


def zeros(config) -> dict[str, pack.Matrix]:
  """Matrices of no use but for their shapes."""
  S = config.scale_blocks
  return {
    place.name: pack.Matrix(
      place.name,
      np.zeros(config.linears[place.linear][1::-1], np.int8),
      np.ones(S, np.float32),
      config.linears[place.linear].scale_axis,
    )
    for place in layout.matrices(config)
  }


def planned(config, matrices, types='tq2_0', otherwise=None, floats='f16'):
  return tensor_plan.plan_tensors(
    config, gguf_golden.random_params(config), matrices, types, otherwise,
    floats, floats,
  )  # fmt: skip


@pytest.mark.parametrize(
  'leaf, value, message',
  [
    ('layers mlp up kernel', np.nan, 'layers.0.mlp.up has scale .* finite'),
    ('layers mlp up kernel', 1e6, "mlp.up: scale .* give types='f32'"),
    ('head kernel', np.inf, 'head holds inf'),
    ('embed embedding', 1e5, "embed holds 100000, past float16's"),
  ],
)
def test_weights_that_are_no_numbers_are_refused(leaf, value, message):
  params = gguf_golden.random_params(LLAMA)
  *parts, last = leaf.split()
  part = params
  for name in parts:
    part = part[name]
  part[last] = jnp.full_like(part[last], value)
  with pytest.raises(ValueError, match=message):
    tensor_plan.plan_tensors(
      LLAMA,
      params,
      tensor_plan.ternary_matrices(LLAMA, params),
      'tq2_0',
      None,
      'f16',
      'f16',
    )


def test_matrices_that_blocks_cannot_hold_are_refused_or_of_another_type():
  config = replaced(QWEN3, layers=1, d_model=256)
  matrices = zeros(config)
  with pytest.raises(
    ValueError,
    match='layers.0.attention.o: tq2_0 has blocks of 256 weights, and 128 .*'
    "types='q2_0', whose blocks are of 64, or, .* otherwise='q2_0' or 'f16'",
  ):
    planned(config, matrices)
  types = {
    tensor.name: tensor.type
    for tensor in planned(config, matrices, otherwise='q2_0')
  }
  # down has 256 inputs, of which each scale is of 128.
  for name, type in (
    ('attn_output', 'q2_0'), ('ffn_down', 'q2_0'), ('attn_q', 'tq2_0'),
    ('ffn_up', 'tq2_0'), ('attn_q_norm', 'f32'),
  ):  # fmt: skip
    assert types[f'blk.0.{name}.weight'] == type
  small = replaced(config, d_model=32, d_ff=32, heads=1, head_dim=32)
  with pytest.raises(ValueError, match='attention.q: q2_0 has .*; q2_0 has'):
    planned(small, zeros(small), 'q2_0', 'q2_0')
  floating = replaced(config, family='float')
  with pytest.raises(ValueError, match="types='tq2_0' holds -1, 0 and 1"):
    planned(floating, {})
  with pytest.raises(ValueError, match='embedding=q8_0 has .*d_model=40 is'):
    planned(replaced(config, d_model=40), {}, floats='q8_0')


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
  stored = to_gguf._as_stored
  calls = []

  def interrupted(values, type):
    calls.append(type)
    if len(calls) == 5:
      raise KeyboardInterrupt
    return stored(values, type)

  monkeypatch.setattr(to_gguf, '_as_stored', interrupted)
  with pytest.raises(KeyboardInterrupt):
    to_gguf.export(run(LLAMA), tmp_path / 'model.gguf', types='tq2_0')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('there', ['a file', 'a folder'])
def test_what_is_there_is_not_written_over(
  there, run, tmp_path, capsys, monkeypatch
):
  out = tmp_path / 'there.gguf'
  if there == 'a file':
    out.write_bytes(b'the one before')
  else:
    out.mkdir()
  # Before anything is read.
  monkeypatch.setattr(to_gguf.restore, 'restore_params', None)
  args = ['--to', 'gguf', '--types', 'tq2_0', '--out', str(out)]
  assert cli.main(['export', str(run(LLAMA)), *args]) == 1
  assert 'there.gguf is there already; name' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['there.gguf']
  assert there == 'a folder' or out.read_bytes() == b'the one before'


def test_a_sample_that_is_no_text_is_named(run, tmp_path, capsys):
  sample = tmp_path / 'latin1.txt'
  sample.write_bytes('déjà vu'.encode('latin-1'))
  args = [
    '--to=gguf', '--types', 'tq2_0', '--pre', 'llama-bpe',
    '--sample', str(sample), '--out', str(tmp_path / 'model.gguf'),
  ]  # fmt: skip
  assert cli.main(['export', str(run(LLAMA, 'code')), *args]) == 1
  assert 'latin1.txt is not UTF-8: ' in capsys.readouterr().err


def test_a_damaged_file_is_no_longer_the_models(run, tmp_path):
  """Each byte of a matrix counts: code, scale, or neither's."""
  file = tmp_path / 'model.gguf'
  to_gguf.export(run(LLAMA), file, types='tq1_0')
  sound = gguf_file.read(file)
  tensor = sound.tensors['blk.0.ffn_up.weight']
  data = file.read_bytes()

  def damaged(at, byte):
    # A new file: the old one is mapped.
    other = tmp_path / f'{at}.gguf'
    other.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
    return gguf_file.read(other)

  with pytest.raises(ValueError, match='ffn_up.weight: block 0 .* byte 0x01'):
    list(layout.read_matrices(damaged(tensor.offset, 1)))
  with pytest.raises(ValueError, match='block 0 of our row 0 has the scale'):
    at = tensor.offset + 53
    list(layout.read_matrices(damaged(at, data[at] ^ 1)))
  other = damaged(tensor.offset, data[tensor.offset] ^ 0)
  wanted = sound.value('tritera.fingerprint', str)
  matrices = layout.read_matrices
  assert fingerprint.trit_fingerprint(matrices(other)) == wanted
  known = [b for b in range(256) if -(-256 * (b * 243 // 256) // 243) == b]
  byte = next(b for b in known if b != data[tensor.offset])
  other = damaged(tensor.offset, byte)
  assert fingerprint.trit_fingerprint(matrices(other)) != wanted


def test_files_of_others_do_not_say_which_scales_they_have(tmp_path):
  import gguf

  writer = gguf.GGUFWriter(tmp_path / 'other.gguf', 'llama')
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  with pytest.raises(ValueError, match='not exported by tritera'):
    layout.read_config(gguf_file.read(tmp_path / 'other.gguf'))


def test_without_the_package_the_extra_is_named(
  run, tmp_path, monkeypatch, capsys
):
  monkeypatch.setitem(sys.modules, 'gguf', None)
  args = ['--types', 'tq2_0', '--out', str(tmp_path / 'model.gguf')]
  assert cli.main(['export', str(run(LLAMA)), '--to', 'gguf', *args]) == 1
  assert 'tritera_jax[gguf]' in capsys.readouterr().err
