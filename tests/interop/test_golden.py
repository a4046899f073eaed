# SPDX-License-Identifier: Apache-2.0
"""Imported checkpoints compute what transformers computes (golden/make.py)."""

from pathlib import Path
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tritera_jax.checkpoint import pack, packed_file, restore
from tritera_jax.generate import packed
from tritera_jax.interop import importing
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params

GOLDEN = Path(__file__).parent / 'golden'
CASES = sorted(path.parent.name for path in GOLDEN.glob('*/config.json'))
# Those whose file does not say that their values are ternary.
TERNARY = {'trilm_2', 'trilm_3', 'bitnet', 'bitlinear'}
# Those of int8 activations; all but the last have norms before o and down, and
# the first two ReLU squared.
INT8 = ('bitnet', 'bitnet_online', 'old_bitnet', 'bitlinear')
RELATIVE = 1e-4


def logits_of(
  config: ModelConfig, params: Params, tokens_BT: np.ndarray
) -> np.ndarray:
  """What our decoder computes, compiled in half the time."""
  model = decoder.bind(config, params)
  forward = jax.jit(
    model.__call__, compiler_options={'xla_backend_optimization_level': 0}
  )
  return np.asarray(forward(tokens_BT.astype(np.int32))[0])


def relative(logits: np.ndarray, wanted: np.ndarray) -> float:
  """The largest difference over the largest logit: none near 0 decides."""
  return float(np.abs(logits - wanted).max() / np.abs(wanted).max())


def largest_difference(run: Path, expected: Path) -> float:
  """Of a run's logits from those expected, relative to the largest of them."""
  wanted = load_file(expected)
  experiment, params = restore.restore_params(run)
  logits = logits_of(experiment.model, params, wanted['tokens'])
  return relative(logits, wanted['logits'])  # both in float32


def checkpoint(case: str, folder: Path, golden: Path = GOLDEN) -> Path:
  """A case's folder, with the tokenizer that all share."""
  shutil.copytree(golden / case, folder)
  (folder / 'expected.safetensors').unlink()
  shutil.copyfile(golden / 'tokenizer.json', folder / 'tokenizer.json')
  return folder


def test_there_are_cases():
  assert len(CASES) == 9


@pytest.mark.parametrize('case', CASES)
def test_logits(case, tmp_path):
  source = checkpoint(case, tmp_path / 'source')
  report = importing.import_run(source, tmp_path / 'run')
  assert (report.weights == 'ternary') == (case in TERNARY)
  difference = largest_difference(
    tmp_path / 'run', GOLDEN / case / 'expected.safetensors'
  )
  assert difference <= RELATIVE


@pytest.mark.parametrize('case', INT8)
def test_logits_of_packed_models(case, tmp_path):
  source = checkpoint(case, tmp_path / 'source')
  importing.import_run(source, tmp_path / 'run')
  wanted = load_file(GOLDEN / case / 'expected.safetensors')
  forward = jax.jit(lambda model, tokens: model(tokens)[0])
  for format in ('two_bit', 'base_three'):
    folder = pack.pack(
      tmp_path / 'run', format, activations='int8', head='float'
    ).folder
    # Keys and values in bfloat16 keep 8 bits, and turn roundings to int8; on a
    # CPU all layers are one call then.
    for cache, most in (('float32', RELATIVE), ('bfloat16', 0.06)):
      model = packed.bind(packed_file.read(folder), cache=cache)
      logits = forward(model, wanted['tokens'].astype(np.int32))
      assert relative(np.asarray(logits), wanted['logits']) <= most
