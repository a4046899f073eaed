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
from tritera_jax.interop.huggingface import importing
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params

GOLDEN = Path(__file__).parents[1] / 'golden'
CASES = sorted(path.parent.name for path in GOLDEN.glob('*/config.json'))
# Those whose file does not say that their values are ternary.
TERNARY = {'trilm_2', 'trilm_3', 'bitnet', 'bitlinear'}
# Those of int8 activations; all but the last have norms before o and down, and
# the first two ReLU squared.
INT8 = ('bitnet', 'bitnet_online', 'old_bitnet', 'bitlinear')
RELATIVE = 1e-4
LEVEL = 6e-2  # what levels of int8 may come to in logits


def logits_of(
  config: ModelConfig, params: Params, tokens_BT: np.ndarray
) -> np.ndarray:
  """What our decoder computes, compiled in half the time."""
  model = decoder.bind(config, params)
  forward = jax.jit(
    model.__call__, compiler_options={'xla_backend_optimization_level': 0}
  )
  return np.asarray(forward(tokens_BT.astype(np.int32))[0])


def check_logits(
  logits_BTV: np.ndarray, wanted_BTV: np.ndarray, *, int8: bool
) -> float:
  """Compares with the logits of transformers; both in float32.

  Args:
    logits_BTV: ours.
    wanted_BTV: theirs.
    int8: the model rounds activations. One that lies between two levels goes
      to the one or the other by the order of a sum, which is each processor's
      own: its token, and those that see it, are a level off. Of most tokens
      none does.

  Returns:
    A token's difference, relative to the largest logit, so that none near 0
    decides: the largest, or the median if int8.
  """
  difference_BT = np.abs(logits_BTV - wanted_BTV).max(axis=-1)
  difference_BT = difference_BT / np.abs(wanted_BTV).max()
  found = float(np.median(difference_BT) if int8 else difference_BT.max())
  assert found <= RELATIVE
  assert difference_BT.max() <= LEVEL
  return found


def check_run(run: Path, expected: Path) -> float:
  """`check_logits` of a run and a file of tokens and logits."""
  wanted = load_file(expected)
  experiment, params = restore.restore_params(run)
  model = experiment.model
  logits_BTV = logits_of(model, params, wanted['tokens'])
  return check_logits(
    logits_BTV, wanted['logits'], int8=model.activation_bits == 8
  )


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
  check_run(tmp_path / 'run', GOLDEN / case / 'expected.safetensors')


@pytest.mark.parametrize('case', INT8)
def test_logits_of_packed_models(case, tmp_path):
  source = checkpoint(case, tmp_path / 'source')
  importing.import_run(source, tmp_path / 'run')
  wanted = load_file(GOLDEN / case / 'expected.safetensors')
  forward = jax.jit(lambda model, tokens: model(tokens)[0])
  tokens_BT = wanted['tokens'].astype(np.int32)
  for format in ('two_bit', 'base_three'):
    folder = pack.pack(tmp_path / 'run', format, head='float').folder
    of = lambda cache, folder=folder: np.asarray(
      forward(packed.bind(packed_file.read(folder), cache=cache), tokens_BT)
    )
    check_logits(of('float32'), wanted['logits'], int8=True)
    # Keys and values in bfloat16 keep 8 bits, and turn roundings to int8; on a
    # CPU all layers are one call then.
    difference = np.abs(of('bfloat16') - wanted['logits']).max()
    assert difference <= LEVEL * np.abs(wanted['logits']).max()
