# SPDX-License-Identifier: Apache-2.0
"""Runs of random weights, and the golden files that llama.cpp has run.

  python -m tests.interop.gguf_golden

exports GOLDEN anew into tests/interop/golden and has llama.cpp, of the extra
`peers`, compute the logits that lie beside each file.
"""

import dataclasses
from pathlib import Path
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from tritera_jax.checkpoint import save
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.gguf import to_gguf
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig

FOLDER = Path(__file__).parent / 'golden'
TEXT = 'def f(x):\n    return x + 1  # 12\n\n\nclass A(B):\n    pass\n'
VOCABULARY = 272

# Two heads of queries a head of keys; more than one scale a matrix.
LLAMA = ModelConfig(
  family='ternary', vocab_size=VOCABULARY, vocab_multiple=1, layers=1,
  d_model=256, d_ff=256, heads=4, kv_heads=1, head_dim=64, context_length=64,
  norm_eps=1e-6, rope_theta=50_000.0,
)  # fmt: skip
QWEN3 = dataclasses.replace(
  LLAMA, d_model=128, heads=2, qk_norm=True, scale_blocks=2, layers=2
)
GOLDEN = {
  'llama_tq1_0': (LLAMA, 'tq1_0'),
  'qwen3_q2_0': (QWEN3, 'q2_0'),
}


def random_params(config: ModelConfig, seed: int = 0) -> decoder.Params:
  """Weights as large as trained ones, and gains that are not 1."""
  rng = np.random.default_rng(seed)

  def fill(path, leaf):
    name = jax.tree_util.keystr(path)
    if 'norm' in name:
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    spread = 1.0 if 'embed' in name else leaf.shape[-2] ** -0.5
    return jnp.asarray(spread * rng.standard_normal(leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(fill, decoder.abstract_params(config))


def make_run(
  folder: Path, config: ModelConfig, params: Any, pieces: Any = 'llama-3'
) -> Path:
  """A run folder as an import leaves it: parameters alone."""
  folder.mkdir(parents=True)
  tokenizer = tokenizer_lib.train_tokenizer([TEXT], config.vocab_size, pieces)
  (folder / 'tokenizer.json').write_text(tokenizer.to_str())
  settings = tiny.experiment(folder / 'no_data', folder, 10)
  settings = dataclasses.replace(settings, model=config)
  save.write_experiment(settings, folder)
  with save.writing(folder, settings.run) as checkpoints:
    save.save(checkpoints, 10, config, save.Weights(params))
  return folder


def ids() -> np.ndarray:
  return np.random.default_rng(1).integers(1, VOCABULARY, 24)


def main():
  from tests.drills import llama_cpp_reads

  for name, (config, types) in GOLDEN.items():
    with tempfile.TemporaryDirectory() as folder:
      run = make_run(Path(folder) / name, config, random_params(config))
      file = FOLDER / f'{name}.gguf'
      file.unlink(missing_ok=True)
      print(to_gguf.export(
        run, file, types=types, embedding='q8_0', head='q8_0', name=name
      ))  # fmt: skip
    logits, _ = llama_cpp_reads.theirs(file, config.context_length)
    np.save(FOLDER / f'{name}.npy', logits(ids()).astype(np.float32))


if __name__ == '__main__':
  main()
