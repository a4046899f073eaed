# SPDX-License-Identifier: Apache-2.0
"""How much does a TriLM lose to a FloatLM of the same shape, and at what size?

The nine Spectra sizes as TriLM and FloatLM, and three of them as BiLM
(arXiv 2407.12327, Table 3): 300B tokens of SlimPajama, GPT-NeoX tokenizer.

  machine   the paper: 6 x V100 nodes of Summit; here any mesh
  expected  validation loss by the paper's fits L = A / N^0.26 + eps: TriLM
            99M 3.30, 3.9B 2.35; FloatLM 99M 2.99, 3.9B 2.18 (nats a token)
  command   tritera train experiments/spectra.py:trilm_99m \
              --data.path DATASET --mesh.fsdp -1
            tritera show experiments/spectra.py:trilm_3.9b
            tritera prepare stdlib data/mini --vocab-size 1024
            tritera train experiments/spectra.py:mini_trilm_96

TriLM takes 1M tokens a step under the two-intervention schedule, FloatLM 2M
under a cosine. The papers do not state weight decay, warm-up, Adam's epsilon
or the clipping norm: those are ours. BiLM's settings are TriLM's (not
stated either). The minis, for 2 CPU cores, are three widths of two layers, with
0.6M tokens of the standard library: the same families and schedules, and a
comparison at 1 to 3 tokens a parameter where the paper has 75 to 3000.
"""

import dataclasses

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary.quantize import Family
from tritera_jax.ternary.schedule import CosineSchedule, TriLMSchedule

TOKENS = 300 * 10**9
SEQUENCE = 2048

# size: d_model, d_ff, heads, head_dim, layers, scale blocks (the paper's
# model-parallel degree), FloatLM's peak rate, TriLM's two.
SIZES = {
  '99m': (512, 1280, 8, 64, 16, 1, 4.0e-4, 2.4e-3, 1.5e-3),
  '190m': (768, 2048, 12, 64, 16, 1, 4.0e-4, 2.4e-3, 1.5e-3),
  '390m': (1024, 2560, 16, 64, 24, 1, 3.0e-4, 1.8e-3, 1.2e-3),
  '560m': (1280, 3072, 20, 64, 24, 1, 2.8e-4, 1.6e-3, 1.1e-3),
  '830m': (1536, 4096, 24, 64, 24, 1, 2.5e-4, 1.5e-3, 1.0e-3),
  '1.1b': (1792, 5120, 28, 64, 24, 2, 2.2e-4, 1.3e-3, 9.0e-4),
  '1.5b': (2048, 6144, 32, 64, 24, 2, 2.0e-4, 1.2e-3, 8.0e-4),
  '2.4b': (2304, 7680, 36, 64, 30, 3, 2.0e-4, 1.2e-3, 8.0e-4),
  '3.9b': (3072, 9216, 24, 128, 30, 6, 1.5e-4, 1.2e-3, 8.0e-4),
}
FAMILIES: dict[str, Family] = {
  'trilm': 'ternary',
  'floatlm': 'float',
  'bilm': 'binary',
}
BILM_SIZES = ('99m', '560m', '1.1b')

MINI_WIDTHS = (64, 96, 128)
MINI_COSINE = 2e-3
MINI_PEAKS = (8e-3, 5.5e-3)


def spectra(prefix: str, size: str) -> Experiment:
  d, f, heads, head_dim, layers, blocks, cosine, first, second = SIZES[size]
  model = ModelConfig(
    family=FAMILIES[prefix],
    vocab_size=50_277,
    layers=layers,
    d_model=d,
    d_ff=f,
    heads=heads,
    kv_heads=heads,
    head_dim=head_dim,
    context_length=SEQUENCE,
    scale_blocks=blocks,
    dtype='bfloat16',
  )
  if prefix == 'floatlm':
    schedule, batch = CosineSchedule(cosine, warmup_steps=1000), 1024
  else:
    schedule, batch = TriLMSchedule(first, second, warmup_steps=1000), 512
  steps = TOKENS // (batch * SEQUENCE)
  return Experiment(
    model,
    DataConfig('data/slimpajama-300b', batch, SEQUENCE),
    OptimizerConfig(schedule),
    RunConfig(
      f'runs/spectra/{prefix}_{size}',
      steps,
      evaluate_every=5000,
      evaluate_tokens=2**22,
      save_every=5000,
      keep=3,
    ),
  )


def mini(prefix: str, width: int) -> Experiment:
  base = spectra(prefix, '99m')
  if prefix == 'floatlm':
    schedule = CosineSchedule(MINI_COSINE, warmup_steps=50)
  else:
    schedule = TriLMSchedule(*MINI_PEAKS, warmup_steps=50)
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      vocab_size=1024,
      layers=2,
      d_model=width,
      d_ff=-(-width * 8 // 3 // 32) * 32,
      heads=2,
      kv_heads=2,
      head_dim=width // 2,
      context_length=128,
      dtype='float32',
    ),
    data=DataConfig('data/mini', 8, 128),
    optimizer=OptimizerConfig(schedule),
    run=RunConfig(
      f'runs/spectra/mini_{prefix}_{width}',
      600,
      evaluate_every=600,
      evaluate_tokens=2**16,
      save_every=600,
    ),
  )


def sweep() -> dict[str, Experiment]:
  names = [(p, s) for p in ('trilm', 'floatlm') for s in SIZES]
  names += [('bilm', size) for size in BILM_SIZES]
  found = {f'{prefix}_{size}': spectra(prefix, size) for prefix, size in names}
  return found | {
    f'mini_{prefix}_{width}': mini(prefix, width)
    for prefix in FAMILIES
    for width in MINI_WIDTHS
  }
