# SPDX-License-Identifier: Apache-2.0
"""What do 1.2 trillion tokens give a ternary model of 1.5B to 3.6B?

The three TriLMs of Spectra-1.1 (arXiv 2506.23025), called 1B, 2B and 3B there.

  machine   the paper: up to 2,048 GPUs (MI250X); here any mesh
  expected  not published as losses; zero-shot ARC-e 62.5, 67.4, 71.9
  command   tritera train experiments/spectra_1_1.py:trilm_3.6b \
              --data.path DATASET --mesh.data 64 --mesh.fsdp -1
            tritera prepare stdlib data/mini --vocab-size 1024
            tritera train experiments/spectra_1_1.py:mini_4x

INFERRED, not published: every shape below. 3.6b has the one shape the
authors' kernel benchmark names (width 3072, SwiGLU 11264, keys and values 768
wide) with as many layers as give 3.6B; 1.5b and 2.5b are scaled from it.
Batch, warm-up and context are ours. Unlike spectra.py: QK-norm, grouped
queries, one peak rate under a cosine, 1.2T tokens. The minis, for 2 CPU cores,
keep those and give one small model 0.3M tokens and four times as many, as 1.2T
is four times Spectra's 300B.
"""

import dataclasses

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import CosineSchedule

TOKENS = 1_200 * 10**9
SEQUENCE = 2048
BATCH = 1024

# size: d_model, d_ff, heads, kv_heads, layers; heads are 128 wide.
INFERRED_SIZES = {
  '1.5b': (2048, 7680, 16, 4, 23),
  '2.5b': (2560, 9472, 20, 5, 26),
  '3.6b': (3072, 11264, 24, 6, 26),
}


def trilm(size: str) -> Experiment:
  d, f, heads, kv_heads, layers = INFERRED_SIZES[size]
  return Experiment(
    ModelConfig(
      family='ternary',
      vocab_size=50_277,
      layers=layers,
      d_model=d,
      d_ff=f,
      heads=heads,
      kv_heads=kv_heads,
      head_dim=128,
      context_length=SEQUENCE,
      qk_norm=True,
      dtype='bfloat16',
    ),
    DataConfig('data/spectra-1.1', BATCH, SEQUENCE),
    OptimizerConfig(CosineSchedule(1.5e-3, warmup_steps=2000), epsilon=1e-5),
    RunConfig(
      f'runs/spectra_1_1/trilm_{size}',
      TOKENS // (BATCH * SEQUENCE),
      evaluate_every=5000,
      evaluate_tokens=2**22,
      save_every=2000,
      keep=3,
    ),
  )


def mini(times: int) -> Experiment:
  base = trilm('1.5b')
  steps = 300 * times
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      vocab_size=1024,
      layers=2,
      d_model=96,
      d_ff=352,
      heads=4,
      kv_heads=1,
      head_dim=24,
      context_length=128,
      dtype='float32',
    ),
    data=DataConfig('data/mini', 8, 128),
    optimizer=OptimizerConfig(
      CosineSchedule(8e-3, warmup_steps=50), epsilon=1e-5
    ),
    run=RunConfig(
      f'runs/spectra_1_1/mini_{times}x',
      steps,
      evaluate_every=steps,
      evaluate_tokens=2**16,
      save_every=steps,
    ),
  )


def sweep() -> dict[str, Experiment]:
  suite = {f'trilm_{size}': trilm(size) for size in INFERRED_SIZES}
  return suite | {f'mini_{times}x': mini(times) for times in (1, 4)}
