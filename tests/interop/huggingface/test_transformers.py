# SPDX-License-Identifier: Apache-2.0
"""Live comparisons with transformers, in an environment that has it.

torch is not built for every Python that JAX is: the environment is another
(`make hf`), whose interpreter TRITERA_TRANSFORMERS names.
"""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.interop import runs
from tests.interop.huggingface.test_golden import (
  CASES,
  GOLDEN,
  check_logits,
  check_run,
  checkpoint,
  logits_of,
)
from tritera_jax.checkpoint import pack, restore
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.huggingface import importing, to_huggingface


def interpreter() -> str | None:
  named = os.environ.get('TRITERA_TRANSFORMERS')
  if named or not all(map(importlib.util.find_spec, ('torch', 'transformers'))):
    return named
  return sys.executable


pytestmark = pytest.mark.skipif(
  interpreter() is None, reason='needs torch and transformers: make hf'
)


def reference(script: str, *arguments: str | Path):
  """Runs a script of golden/ where transformers is."""
  # Without our packages: that environment has no JAX.
  environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  subprocess.run(
    [str(interpreter()), GOLDEN / script, *arguments],
    check=True,
    env=environment,
    timeout=1200,
  )


def test_golden_live(tmp_path):
  """The committed files are what this torch and transformers make."""
  reference('make.py', tmp_path)
  for case in CASES:
    source = checkpoint(case, tmp_path / 'sources' / case, tmp_path)
    importing.import_run(source, tmp_path / 'runs' / case)
    expected = tmp_path / case / 'expected.safetensors'
    print(f'{case}: {check_run(tmp_path / "runs" / case, expected):.1e}')


BITNET = {
  'sub_norm': True,
  'mlp_activation': 'relu2',
  'activation_bits': 8,
}
MODELS = {
  'trilm': ({'scale_blocks': 3, 'kv_heads': 4}, {}),
  'trilm_half': ({'scale_blocks': 2}, {'dtype': 'float16'}),
  'qk_norm': ({'qk_norm': True, 'head_dim': 24, 'scale_blocks': 2}, {}),
  'bitnet': (BITNET, {}),
  'bitnet_packed': (BITNET, {'form': 'packed'}),
  'bitnet_latents': ({**BITNET, 'scale_floor': True}, {'form': 'latents'}),
  'bitnet_blocks': ({**BITNET, 'scale_blocks': 2}, {}),
  'int8_llama_packed': ({'activation_bits': 8}, {'form': 'packed'}),
  'swiglu_sub_norm': ({'sub_norm': True}, {}),
  'float': ({'family': 'float'}, {'shard_bytes': 50_000}),
  'binary': ({'family': 'binary', 'scale_blocks': 2}, {}),
}
TEXTS = ['def f(x):\n    return x + 1\n', ' a  b\t', 'naïve 字 🙂', '']


def test_exports_live(tiny_data, tmp_path):
  """AutoModelForCausalLM and AutoTokenizer take what was exported."""
  tokens = np.random.default_rng(0).integers(1, 300, (2, 12))
  jobs = []
  for name, (fields, how) in MODELS.items():
    run = runs.make(tmp_path / 'runs' / name, tiny_data, runs.shape(**fields))
    to_huggingface.export(run, tmp_path / name, **how)
    job = {'name': name, 'folder': str(tmp_path / name)}
    jobs.append(
      job | {'tokens': tokens.tolist(), 'texts': TEXTS, 'prompt': 'import '}
      | {'new_tokens': 12}
    )  # fmt: skip
  (tmp_path / 'jobs.json').write_text(json.dumps(jobs))
  out = tmp_path / 'out'
  out.mkdir()
  reference('score.py', tmp_path / 'jobs.json', out)

  for name, (_, how) in MODELS.items():
    theirs = json.loads((out / f'{name}.json').read_text())
    run = tmp_path / 'runs' / name
    experiment, params = restore.restore_params(run)
    ours = logits_of(experiment.model, params, tokens)
    logits = load_file(out / f'{name}.safetensors')['logits']
    dtype = how.get('dtype', 'float32')
    assert theirs['dtype'] == f'torch.{dtype}'
    exact = dtype == 'float32'
    if exact:
      int8 = experiment.model.activation_bits == 8
      difference = check_logits(ours, logits, int8=int8)
    else:
      difference = np.abs(ours - logits).max() / np.abs(logits).max()
      assert difference <= 2e-2
    print(f'{name}: {theirs["architecture"]} {difference:.1e}')

    tokenizer = tokenizer_lib.load_tokenizer(run / 'tokenizer.json')
    assert theirs['ids'] == [tokenizer.encode(text).ids for text in TEXTS]
    assert theirs['decoded'] == TEXTS
    assert theirs['end'] == tokenizer_lib.end_of_text_id(tokenizer)
    if exact:
      # Its greedy tokens, rows of the padding too, are what ours would be.
      row = np.array([theirs['generated']], np.int32)
      ours = logits_of(experiment.model, params, row[:, :-1])
      start = len(tokenizer.encode('import ').ids)
      best = ours[0].argmax(-1)[start - 1 :]
      assert best.tolist() == row[0, start:].tolist(), name


@pytest.mark.parametrize('name', ['trilm', 'bitnet_packed'])
def test_round_trip(name, tiny_data, tmp_path):
  """Orbax -> Hugging Face -> Orbax: the same codes and scales."""
  fields, how = MODELS[name]
  run = runs.make(tmp_path / 'run', tiny_data, runs.shape(**fields))
  report = to_huggingface.export(run, tmp_path / 'hf', **how)
  importing.import_run(tmp_path / 'hf', tmp_path / 'again')
  proofs = []
  for folder in (run, tmp_path / 'again'):
    experiment, params = restore.restore_params(folder)
    proofs.append(pack.latent_fingerprint(experiment.model, params))
  assert proofs == [report.fingerprint] * 2
