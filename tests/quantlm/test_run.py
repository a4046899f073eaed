# SPDX-License-Identifier: Apache-2.0
import collections
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from tests.model import oracle
from tritera_jax import cli
from tritera_jax.checkpoint import restore, save
from tritera_jax.eval import perplexity
from tritera_jax.model import decoder, quantized
from tritera_jax.quantlm import calibration
from tritera_jax.quantlm.run import Quantization, quantize

MODEL = dataclasses.replace(tiny.MODEL, family='float')


@pytest.fixture(scope='module')
def float_run(tiny_run, tmp_path_factory):
  """What the trained TriLM computes, as a FloatLM; and noise on its weights."""
  settings, params = restore.restore_params(tiny_run)
  rng = np.random.default_rng(0)
  params = quantized.effective_params(settings.model, params)
  for name in MODEL.linears:
    part, leaf = name.split('.')
    w_LKN = params['layers'][part][leaf]['kernel']
    noise_LKN = 0.3 * w_LKN.std() * rng.normal(size=w_LKN.shape)
    params['layers'][part][leaf]['kernel'] = w_LKN + noise_LKN.astype('f')
  folder = tmp_path_factory.mktemp('float')
  save.write_experiment(dataclasses.replace(settings, model=MODEL), folder)
  shutil.copyfile(tiny_run / 'tokenizer.json', folder / 'tokenizer.json')
  with save.writing(folder, settings.run) as checkpoints:
    save.save(checkpoints, 20, MODEL, save.Weights(params))
  return folder


def coarse(w_KN):
  return np.round(w_KN * 32) / 32


def test_sums_are_of_the_numpy_decoder_s_inputs():
  """Of a float block's layers, behind blocks that are quantised already."""
  config = dataclasses.replace(MODEL, document_separator=3)
  params = decoder.init(config, jax.random.key(0))
  tokens = np.random.default_rng(0).integers(4, 384, (2, 10), np.int32)
  tokens[1, 6] = 3
  seen = []

  def quantizer_for(sum_KK):
    seen.append(sum_KK)
    return coarse

  got = calibration.block_by_block(
    config, params, [tokens[:1], tokens[1:]], quantizer_for
  )
  every = calibration.each_matrix(config, params, coarse)
  jax.tree.map(np.testing.assert_array_equal, got, every)

  first = jax.tree.map(np.array, params)
  for name in config.linears:
    part, leaf = name.split('.')
    kernel = first['layers'][part][leaf]['kernel']
    kernel[0] = coarse(kernel[0])
    assert (kernel[0] != params['layers'][part][leaf]['kernel'][0]).any()
  wanted = collections.defaultdict(float)
  for at, weights in ((0, params), (1, first)):

    def watch(layer, name, x, at=at):
      if layer == at:
        wanted[layer, name] += x.T @ x

    for document in (tokens[0], tokens[1, :6], tokens[1, 6:]):
      oracle.decoder(config, weights, document, watch)
  places = [
    (layer, name)
    for layer in (0, 1)
    for name in ('attention.q', 'attention.o', 'mlp.gate', 'mlp.down')
  ]
  for ours, place in zip(seen, places, strict=True):
    theirs = wanted[place]
    np.testing.assert_allclose(
      ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max()
    )


@pytest.mark.parametrize('method', ['gptq', 'round_to_nearest'])
def test_a_quantised_run_is_scored_as_a_run(float_run, tmp_path, method):
  before = perplexity.evaluate(float_run).nats_per_token
  losses = {}
  for bits in (8, 2):
    out = tmp_path / str(bits)
    report = quantize(
      float_run, out, Quantization(bits, 16, method=method, samples=11)
    )
    assert report.bits_per_weight == bits + 2
    losses[bits] = perplexity.evaluate(out).nats_per_token
    record = json.loads((out / 'quantized.json').read_text())
    assert (record['step'], record['run']) == (20, str(float_run))
    assert record['quantization']['method'] == method
    tokens = 11 * 32 if method == 'gptq' else 0
    assert record['calibration_tokens'] == tokens
    _, params = restore.restore_params(out)
    _, floats = restore.restore_params(float_run)
    for name in MODEL.linears:
      part, leaf = name.split('.')
      ours = np.asarray(params['layers'][part][leaf]['kernel'])
      assert ours.shape == floats['layers'][part][leaf]['kernel'].shape
      for group in ours.reshape(2, -1, 16, ours.shape[-1]).swapaxes(2, 3):
        most = max(len(set(g.tolist())) for g in group.reshape(-1, 16))
        assert most <= 2**bits
    for name in ('embed', 'norm', 'head'):
      jax.tree.map(np.testing.assert_array_equal, params[name], floats[name])
  # 8 bits move a weight by at most 1/510 of its group's range.
  assert losses[8] == pytest.approx(before, abs=1e-3)
  assert abs(losses[2] - before) > 10 * abs(losses[8] - before)


def run(capsys, *arguments):
  code = cli.main(['quantize', *map(str, arguments)])
  captured = capsys.readouterr()
  return code, captured.out + captured.err


def test_the_verb(capsys, float_run, tmp_path):
  out = tmp_path / 'out'
  arguments = (float_run, '--bits', 4, '--group', 8, '--out', out)
  code, said = run(capsys, *arguments, '--method', 'round_to_nearest')
  # 2 x 20,736 weights of 8 bits, 36,864 of embedding and head and 288 gains
  # of 16: 926,208 bits.
  assert code == 0 and f'{out}: 8 bits/weight, 0.9 Mbit in all' in said
  code, said = run(capsys, *arguments)
  assert code == 1 and 'is there already; name a folder to be made' in said


def test_what_cannot_be_quantised_is_refused(
  capsys, float_run, tiny_run, tmp_path
):
  out = tmp_path / 'out'
  code, said = run(capsys, tiny_run, '--bits', 4, '--out', out)
  assert code == 1 and "model.family='ternary' of" in said
  code, said = run(capsys, float_run, '--bits', 4, '--out', out)
  assert code == 1
  assert 'attention.q: group=128 does not divide the 48 inputs' in said
  code, said = run(capsys, float_run, '--bits', 12, '--out', out)
  assert code == 1 and 'bits=12 must lie in 2..8' in said
  assert not out.exists()
