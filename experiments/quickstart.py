# SPDX-License-Identifier: Apache-2.0
"""How well does a TriLM write Python after some two minutes on two CPU cores?

  machine   2 CPU cores, no accelerator; `make quickstart` runs it
  expected  1.49 bits a byte on the held-out files (3.43 nats a token), where
            gzip -9 takes 1.93, xz -9 1.55 and a unigram model 2.87
  command   tritera prepare stdlib data/quickstart --vocab-size 4096
            tritera train experiments/quickstart.py

Size, vocabulary, batch and rate come from this sweep (bits a byte on the
held-out files, one seed each; AMD EPYC with AVX-512, 2 cores, float32,
2026-11-21). Rates are the first peak. Head width 128 unless said.

  480 steps, 0.49M tokens each
  vocabulary  layers  d_model  batch      rate   bits/byte
        2048       4      256  8 x 128    2e-3       1.764
        2048       4      256  4 x 128  1.5e-3       1.774
        1024       4      256  8 x 128    2e-3       1.841
        2048       2      256  8 x 128    2e-3       1.734
        2048       2      256  8 x 128    4e-3       1.746
        4096       2      256  8 x 128    2e-3       1.691
        4096       1      256  8 x 128    2e-3       1.698
        8192       2      256  8 x 128    2e-3       1.674  (slower steps)

  150 s each, in quiet
  vocabulary  layers  d_model  steps  s/step  bits/byte
        4096       2      256   1230   0.129      1.470
        4096       4      256    738   0.192      1.637
        4096       2      512    572   0.262      1.632  (rate 1.5e-3)

On another split, before these: batches of 4 x 256 were 0.1 worse than 8 x 128
at equal tokens, heads of 64 slower, and a rate of 1e-2 failed.
"""

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.schedule import TriLMSchedule


def experiment() -> Experiment:
  return Experiment(
    ModelConfig(
      family='ternary',
      vocab_size=4096,
      layers=2,
      d_model=256,
      d_ff=768,
      heads=2,
      kv_heads=2,
      head_dim=128,
      context_length=128,
    ),
    DataConfig('data/quickstart', batch_size=8, sequence_length=128),
    OptimizerConfig(TriLMSchedule(2e-3, 1.32e-3, warmup_steps=50)),
    RunConfig(
      'runs/quickstart',
      steps=1100,
      telemetry_every=50,
      evaluate_every=275,
      evaluate_tokens=16_384,
      save_every=275,
    ),
  )
