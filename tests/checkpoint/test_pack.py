# SPDX-License-Identifier: Apache-2.0
import dataclasses
import hashlib
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from tests.model.test_decoder import VARIANTS, parameters
from tests.ternary import oracle
from tritera_jax.checkpoint import pack, packed_file, restore
from tritera_kernels import byte_matrix, fingerprint, packed

FORMATS = ['two_bit', 'base_three']


def oracle_matrices(config, params):
  """Names, codes [N, K], scales and axes by the NumPy oracle."""
  for name in ('attention.q', 'attention.k', 'attention.v', 'attention.o',
               'mlp.gate', 'mlp.up', 'mlp.down'):  # fmt: skip
    part, leaf = name.split('.')
    stacked = np.asarray(params['layers'][part][leaf]['kernel'])
    axis = 'in' if leaf in ('o', 'down') else 'out'
    for layer in range(config.layers):
      codes, _, scale = oracle.ternary(
        stacked[layer].T, config.scale_blocks, axis
      )
      yield f'layers.{layer}.{name}', codes.astype(np.int8), scale, axis


def test_latents_and_both_formats_hold_the_same_codes_and_scales(tiny_run):
  experiment, params = restore.restore_params(tiny_run)
  latent = pack.latent_fingerprint(experiment.model, params)
  models = [packed_file.read(tiny_run / 'packed' / f) for f in FORMATS]
  assert {m.fingerprint for m in models} == {latent}
  wanted = list(oracle_matrices(experiment.model, params))
  for model in models:
    assert sorted(model.matrices) == sorted(name for name, *_ in wanted)
    for name, codes, scale, axis in wanted:
      got_codes, got_scale = packed.unpack(model.matrices[name])
      np.testing.assert_array_equal(got_codes, codes)
      np.testing.assert_allclose(got_scale, scale, rtol=3e-7)
      assert model.matrices[name].scale_axis == axis
  # The fingerprint sees codes alone and their order: the oracle's, with the
  # scales that were read, gives the same.
  again = fingerprint.trit_fingerprint(
    (name, codes, np.asarray(models[0].matrices[name].scale), axis)
    for name, codes, _, axis in wanted
  )
  assert again == latent


@pytest.fixture
def folder(tiny_run, tmp_path):
  return shutil.copytree(tiny_run / 'packed' / 'two_bit', tmp_path / 'packed')


def rewrite(folder, metadata=None, tensors=None):
  """The file with metadata or tensors changed."""
  file = folder / 'model.safetensors'
  with safetensors.safe_open(file, framework='np') as opened:
    old = opened.metadata()
    arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  arrays.update(tensors or {})
  arrays = {k: v for k, v in arrays.items() if v is not None}
  safetensors.numpy.save_file(arrays, file, {**old, **(metadata or {})})
  return arrays


Q = 'layers.0.attention.q.packed'


@pytest.mark.parametrize(
  ('metadata', 'message'),
  [
    ({'kind': 'gguf'}, "kind='gguf', wanted 'tritera-packed'"),
    ({'version': '9'}, "version='9', wanted '1' or '2'"),
    ({'head': 'int4'}, "head='int4', wanted 'float' or 'int8'"),
    ({'head': 'int8'}, 'tensor embed: shape F32.*there, none by'),
    ({'bytes_digest': '00'}, 'its metadata says 00; the file is damaged'),
    ({'format': 'five_bit'}, "format='five_bit' is unknown"),
    ({'layout_version': '2'}, "layout_version='2', wanted '1'"),
    ({'activations': 'int4'}, "activations='int4', wanted 'float' or 'b"),
    ({'model': '{}'}, 'metadata model: (.|\n)*family'),
    ({'fingerprint': 'trits1:00'}, 'the file is damaged'),
    ({'format': 'base_three'}, 'tensor layers.0.attention.k.packed: shape'),
  ],
)
def test_metadata_that_lies_is_refused(folder, metadata, message):
  rewrite(folder, metadata)
  with pytest.raises(ValueError, match=message):
    packed_file.read(folder)


def test_a_damaged_tensor_is_refused(folder):
  arrays = rewrite(folder)
  impossible = arrays[Q].copy()
  impossible[0, 0] = 0xFF
  rewrite(folder, tensors={Q: impossible})
  with pytest.raises(ValueError, match=r'attention.q: data\[0, 0\]=255 is no'):
    packed_file.read(folder)
  flipped = arrays[Q].copy()
  flipped[0, 0] = 0x55 if flipped[0, 0] != 0x55 else 0x54
  rewrite(folder, tensors={Q: flipped})
  with pytest.raises(ValueError, match='the file is damaged: pack again'):
    packed_file.read(folder)
  rewrite(folder, tensors={Q: arrays[Q][:-1]})
  with pytest.raises(ValueError, match='attention.q.packed: shape'):
    packed_file.read(folder)
  rewrite(folder, tensors={Q: None})
  with pytest.raises(ValueError, match='attention.q.packed: shape missing'):
    packed_file.read(folder)
  rewrite(folder, tensors={Q: arrays[Q], 'more': arrays['norm']})
  with pytest.raises(ValueError, match='tensor more: shape .* none by its'):
    packed_file.read(folder)


def test_a_file_cut_short_or_with_a_lying_header_is_refused(folder):
  file = folder / 'model.safetensors'
  whole = file.read_bytes()
  for cut in (0, 4, 100, len(whole) - 1):
    file.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match='not a whole safetensors file'):
      packed_file.read(folder)
  file.write_bytes(struct.pack('<Q', 2**60) + whole[8:])
  with pytest.raises(ValueError, match='not a whole safetensors file'):
    packed_file.read(folder)


@pytest.fixture
def rounded(tiny_run, tmp_path):
  """A packed folder with an int8 head."""
  experiment, params = restore.restore_params(tiny_run)
  model = pack.pack_model(
    experiment.model, params, format='base_three', activations='int8'
  )
  assert model.head == 'int8'
  packed_file.write(model, tmp_path / 'int8', tiny_run / 'tokenizer.json')
  return tmp_path / 'int8', params


def test_an_int8_head_is_the_latents_to_half_a_step(rounded):
  folder, params = rounded
  model = packed_file.read(folder)
  assert model.head == model.activations == 'int8'
  for name, w_VD in (
    ('embed', np.asarray(params['embed']['embedding'])),
    ('head', np.asarray(params['head']['kernel']).T),
  ):
    error = np.abs(byte_matrix.dequantize(model.rest[name]) - w_VD)
    step = np.abs(w_VD).max(axis=1, keepdims=True) / 127
    assert (error <= 0.501 * step).all() and error.max() > 0


@pytest.mark.parametrize(
  ('tensor', 'value', 'message'),
  [
    ('head.packed', 0, r'head: data\[0, 0\]=0 is no weight'),
    ('embed.scale', np.nan, r'embed: scale\[0\]=nan must be finite'),
    ('embed.packed', 255, 'bytes_digest .* the file is damaged'),
  ],
)
def test_a_damaged_int8_head_is_refused(rounded, tensor, value, message):
  folder, _ = rounded
  array = rewrite(folder)[tensor].copy()
  assert array.flat[0] != value
  array.flat[0] = value
  rewrite(folder, tensors={tensor: array})
  with pytest.raises(ValueError, match=message):
    packed_file.read(folder)


def test_the_head_is_float_or_int8_as_the_caller_says(tiny_run):
  experiment, params = restore.restore_params(tiny_run)
  for activations, head in (('int8', 'float'), ('float', 'int8')):
    model = pack.pack_model(
      experiment.model,
      params,
      format='two_bit',
      activations=activations,
      head=head,
    )
    assert (model.activations, model.head) == (activations, head)


def test_a_file_of_version_1_is_read_and_its_fingerprint_proved(folder):
  want = packed_file.read(folder)
  file = folder / 'model.safetensors'
  with safetensors.safe_open(file, framework='np') as opened:
    metadata = opened.metadata()
    arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
  del metadata['head'], metadata['bytes_digest']
  metadata['version'] = '1'
  safetensors.numpy.save_file(arrays, file, metadata)
  got = packed_file.read(folder)
  assert got.head == 'float'
  jax.tree.map(
    np.testing.assert_array_equal,
    (got.matrices, got.rest),
    (want.matrices, want.rest),
  )
  metadata['fingerprint'] = 'trits1:00'
  safetensors.numpy.save_file(arrays, file, metadata)
  with pytest.raises(ValueError, match='its metadata says trits1:00; the file'):
    packed_file.read(folder)


def test_the_bytes_digest_is_the_documented_bytes(folder):
  with safetensors.safe_open(
    folder / 'model.safetensors', framework='np'
  ) as opened:
    metadata = opened.metadata()
    names = sorted(opened.keys(), key=str.encode)
    stream = metadata['fingerprint'].encode() + b'\0'
    for name in names:
      stream += name.encode() + b'\0' + opened.get_tensor(name).tobytes()
  assert hashlib.sha256(stream).hexdigest() == metadata['bytes_digest']


def test_gains_of_norms_inside_a_block_are_in_the_file(tiny_run, tmp_path):
  config = VARIANTS['sub_norm']
  params = parameters(config)
  model = pack.pack_model(config, params, format='two_bit')
  packed_file.write(model, tmp_path, tiny_run / 'tokenizer.json')
  arrays = rewrite(tmp_path)
  for part, width in (('attention', 40), ('mlp', 36)):
    gains = params['layers'][part]['sub_norm']['scale']
    for layer in range(2):
      gain = arrays[f'layers.{layer}.{part}.sub_norm']
      assert gain.shape == (width,)
      np.testing.assert_array_equal(gain, gains[layer])
  assert packed_file.read(tmp_path).config == config
  rewrite(tmp_path, tensors={'layers.1.mlp.sub_norm': None})
  with pytest.raises(ValueError, match='mlp.sub_norm: shape missing'):
    packed_file.read(tmp_path)


def test_what_is_read_lies_where_it_was_read_to(folder, monkeypatch):
  """On a CPU: one copy in memory, aligned for vectors."""
  filled = []
  fill = packed_file._fill
  monkeypatch.setattr(
    packed_file, '_fill', lambda *a: filled.append(fill(*a)) or filled[0]
  )
  model = packed_file.read(folder)
  addresses = {view.ctypes.data for view in filled[0].values()}
  leaves = jax.tree.leaves((model.matrices, model.rest))
  assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == addresses
  assert all(address % 64 == 0 for address in addresses)


def test_only_a_finite_ternary_model_is_packed(tiny_run):
  experiment, params = restore.restore_params(tiny_run)
  twin = dataclasses.replace(experiment.model, family='float')
  with pytest.raises(ValueError, match="family='float' cannot be packed"):
    pack.pack_model(twin, params, format='two_bit')
  kernel = params['layers']['mlp']['up']['kernel']
  params['layers']['mlp']['up']['kernel'] = kernel.at[1, 3, 3].set(jnp.nan)
  with pytest.raises(ValueError, match='layers.1.mlp.up has scale'):
    pack.pack_model(experiment.model, params, format='two_bit')


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'input_norm': True}, 'model.input_norm=True is not known to packed'),
    ({'activation_bits': 8}, "activations='float', and .* give .*'int8'"),
  ],
)
def test_what_packed_models_cannot_express_is_refused(
  tiny_run, folder, changes, message
):
  experiment, params = restore.restore_params(tiny_run)
  model = dataclasses.replace(experiment.model, **changes)
  with pytest.raises(ValueError, match=message):
    pack.pack_model(model, params, format='two_bit', activations='float')
  rewrite(folder, {'model': json.dumps(dataclasses.asdict(model))})
  with pytest.raises(ValueError, match=message):
    packed_file.read(folder)


def test_the_metadata_is_what_the_docstring_says(tiny_run):
  file = tiny_run / 'packed' / 'base_three' / 'model.safetensors'
  with safetensors.safe_open(file, framework='np') as opened:
    metadata = opened.metadata()
    assert opened.get_slice(Q).get_shape() == [48, 10]
  assert metadata['kind'] == 'tritera-packed'
  assert metadata['layout_version'] == '1'
  assert (metadata['version'], metadata['head']) == ('2', 'float')
  assert json.loads(metadata['model'])['d_model'] == 48
