# SPDX-License-Identifier: Apache-2.0

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import checkpoints
from tritera_jax.checkpoint import restore
from tritera_jax.generate import load
from tritera_jax.interop import importing
from tritera_jax.model import quantized

TERNARY = ('trilm', 'trilm_2', 'bitnet', 'bitlinear')
WEIGHTS = {
  'llama': 'float', 'qwen3': 'float', 'bitnet_master': 'latents',
  'b1_58': 'latents', **dict.fromkeys(TERNARY, 'ternary'),
}  # fmt: skip


@pytest.mark.parametrize('kind', checkpoints.KINDS)
def test_logits_are_those_of_an_independent_forward_pass(kind, tmp_path):
  found = checkpoints.tensors(kind)
  source = checkpoints.write(
    tmp_path / 'hf',
    checkpoints.KINDS[kind],
    found,
    shards=1 + (kind != 'llama'),
  )
  report = importing.import_run(source, tmp_path / 'run')
  assert report.weights == WEIGHTS[kind]
  model = load.load(tmp_path / 'run').model
  tokens = np.random.default_rng(1).integers(0, checkpoints.V, 9)
  got, _ = model(jnp.asarray(tokens, jnp.int32)[None])
  want = checkpoints.logits(kind, found, tokens)
  np.testing.assert_allclose(got[0], want, atol=2e-5 * np.abs(want).max())
  if kind in TERNARY:
    settings, params = restore.restore_params(tmp_path / 'run')
    codes_and_scales(kind, found, settings.model, params)


def codes_and_scales(kind, found, model, params):
  """To the bit, in the tensors' own dtype."""
  theirs = dict(zip(model.linears, checkpoints.LINEARS, strict=True))
  for name, (codes, scale) in quantized.codes_and_scales(model, params).items():
    for layer in range(model.layers):
      there = f'model.layers.{layer}.{theirs[name]}'
      values = checkpoints.weight(kind, found, there)
      axis = int(model.linears[name].scale_axis == 'in')
      parts = np.split(values, model.scale_blocks, axis)
      np.testing.assert_array_equal(codes[layer].T, np.sign(values))
      want = [np.float32(np.abs(part).max()) for part in parts]
      np.testing.assert_allclose(scale[layer], want, rtol=2e-7)
      if kind != 'bitlinear':
        np.testing.assert_array_equal(scale[layer], want)
