# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.interop import checkpoints, gguf_golden
from tritera_jax import cli
from tritera_jax.checkpoint import pack, restore
from tritera_jax.interop import verify
from tritera_jax.interop.gguf import to_gguf
from tritera_jax.interop.huggingface import importing, packing, to_huggingface
from tritera_jax.interop.verify import DifferenceError


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """One model in every form, with two scales a matrix."""
  folder = tmp_path_factory.mktemp('forms')
  config = dataclasses.replace(
    gguf_golden.LLAMA, scale_blocks=2, layers=2, d_ff=512, heads=8
  )
  run = gguf_golden.make_run(
    folder / 'run', config, gguf_golden.random_params(config), 'llama-3'
  )
  pack.pack(run, 'base_three')
  hf, half = folder / 'hf', folder / 'half'
  to_huggingface.export(run, hf)
  to_huggingface.export(run, half, dtype='float16')
  importing.import_run(hf, folder / 'again')
  to_gguf.export(run, folder / 'tq2_0.gguf', types='tq2_0')
  with pytest.MonkeyPatch.context() as patch:
    # As llama.cpp's own converter writes it: no word of ours.
    patch.setattr(to_gguf, '_add_ours', lambda *_: None)
    patch.setattr(to_gguf, '_prove', lambda *_: None)
    to_gguf.export(run, folder / 'foreign.gguf', types='tq1_0')
  return {
    'run': run,
    'packed': run / 'packed/base_three',
    'huggingface': hf,
    'half': half,
    'again': folder / 'again',
    'gguf': folder / 'tq2_0.gguf',
    'foreign': folder / 'foreign.gguf',
  }


def test_every_form_holds_the_same(made, capsys):
  experiment, params = restore.restore_params(made['run'])
  want = pack.latent_fingerprint(experiment.model, params)
  coarse = {'half', 'foreign'}
  for a, b in itertools.combinations(made, 2):
    same = verify.verify(made[a], made[b])
    assert same.matrices == 7 * experiment.model.layers, (a, b)
    exact = not {a, b} & coarse
    assert same.scales == ('float32' if exact else 'float16'), (a, b)
    assert (same.fingerprint == want) == exact, (a, b)
  assert cli.main(['verify', str(made['run']), str(made['foreign'])]) == 0
  assert 'scales equal, rounded to float16; trits1:' in capsys.readouterr().out


def changed(source, out, change):
  """The checkpoint with one tensor changed, and nothing that would say so."""
  tensors = safetensors.numpy.load_file(source / 'model.safetensors')
  name = 'model.layers.1.mlp.down_proj.weight'
  tensors[name] = change(tensors[name].copy())
  out.mkdir()
  safetensors.numpy.save_file(tensors, out / 'model.safetensors')
  (out / 'config.json').write_bytes((source / 'config.json').read_bytes())
  return out


def test_the_first_difference_is_named(made, tmp_path, capsys):
  def flip(values_NK):
    values_NK[5, 9] = -values_NK[values_NK != 0][0] * (values_NK[5, 9] == 0)
    return values_NK

  def rescale(values_NK):
    half = values_NK.shape[1] // 2  # down has its scales along inputs
    values_NK[:, half:] *= np.float32(1.001)
    return values_NK

  other = changed(made['huggingface'], tmp_path / 'flipped', flip)
  where = r'layers.1.mlp.down: the code of output 5, input 9 is .*1 of .* diff'
  for name in ('run', 'packed', 'half', 'foreign'):
    with pytest.raises(DifferenceError, match=where):
      verify.verify(made[name], other)
  assert cli.main(['verify', str(other), str(made['gguf'])]) == 1
  assert 'layers.1.mlp.down' in capsys.readouterr().err

  other = changed(made['huggingface'], tmp_path / 'rescaled', rescale)
  for name in ('again', 'gguf', 'foreign'):
    with pytest.raises(DifferenceError, match='down: scale 1 is .* not equal'):
      verify.verify(made[name], other)


def bitlinear(folder, change):
  found = checkpoints.tensors('bitlinear')
  change(found)
  return checkpoints.write(folder, checkpoints.KINDS['bitlinear'], found)


DIVISOR = 'model.layers.1.mlp.down_proj.weight_scale'


def test_divisors_are_compared_as_the_scales_that_they_make(tmp_path):
  """1 / 15.75 and 1 / 15.8125 are one bfloat16."""
  folders = [
    bitlinear(
      tmp_path / str(value),
      lambda found, value=value: found.update(
        {DIVISOR: np.full(1, value, ml_dtypes.bfloat16)}
      ),
    )
    for value in (15.75, 15.8125)
  ]
  words = r'scale 0 is 0.06349\d* in .*, 0.06324\d* in .* not equal in float32'
  with pytest.raises(DifferenceError, match=words):
    verify.verify(*folders)


def test_products_with_a_factor_are_float32(tmp_path):
  """0.75 of these two is one bfloat16, which the factor is stored in."""

  def times(value):
    found = checkpoints.tensors('bitnet')
    for name in [name for name in found if name.endswith('_proj.weight')]:
      codes = np.sign(checkpoints.weight('bitnet', found, name[:-7]))
      found[name] = (codes * value).astype(np.float16)
      factor = np.full(1, 0.75, ml_dtypes.bfloat16)
      found[f'{name[:-7]}.weight_scale'] = factor
    return checkpoints.write(
      tmp_path / str(value), checkpoints.KINDS['bitnet'], found
    )

  with pytest.raises(DifferenceError, match='not equal in float32'):
    verify.verify(times(0.1), times(0.1001))


def test_an_import_is_as_far_off_as_it_says(tmp_path):
  source = bitlinear(tmp_path / 'hf', lambda found: None)
  report = importing.import_run(source, tmp_path / 'run')
  assert report.rounded
  same = verify.verify(source, tmp_path / 'run')
  assert (same.scales, same.ulps) == ('float32', report.ulps)
  assert 'equal but for 1 in the last place' in str(same)
  # Two of ours are the same to the bit.
  pack.pack(tmp_path / 'run', 'two_bit')
  packed = tmp_path / 'run/packed/two_bit'
  assert verify.verify(tmp_path / 'run', packed).ulps == 0
  packing.pack_checkpoint(source, tmp_path / 'direct', format='two_bit')
  with pytest.raises(DifferenceError, match='not equal in float32'):
    verify.verify(tmp_path / 'direct', packed)


def test_the_coarsest_type_of_all_matrices_is_compared(made, tmp_path):
  other = changed(
    made['huggingface'], tmp_path / 'mixed', lambda w: w.astype(np.float16)
  )
  assert verify.verify(made['run'], other).scales == 'float16'


def test_what_has_no_codes_or_is_nothing_is_refused(made, tmp_path):
  noise = np.random.default_rng(0)
  plain = changed(
    made['huggingface'],
    tmp_path / 'plain',
    lambda w: noise.standard_normal(w.shape).astype(np.float32),
  )
  with pytest.raises(ValueError, match=r'down_proj.*not ternary'):
    verify.verify(made['run'], plain)
  left = changed(
    made['huggingface'], tmp_path / 'x.tritera-partial', lambda w: w
  )
  with pytest.raises(ValueError, match='left by a command that was interrup'):
    verify.verify(left, made['run'])
  importing.import_run(
    checkpoints.write(
      tmp_path / 'llama',
      checkpoints.KINDS['llama'],
      checkpoints.tensors('llama'),
    ),
    tmp_path / 'float',
  )
  with pytest.raises(ValueError, match='float is of a FloatLM'):
    verify.verify(tmp_path / 'float', made['run'])
  with pytest.raises(FileNotFoundError, match='no GGUF file, and no folder'):
    verify.verify(made['run'], tmp_path)
  with pytest.raises(ValueError, match='how many scales'):
    verify.verify(made['foreign'], made['foreign'])
