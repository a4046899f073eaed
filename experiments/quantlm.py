# SPDX-License-Identifier: Apache-2.0
"""Is it better to train in 1.58 bits, or in 16 and quantise afterwards?

QuantLM (arXiv 2407.12327): the linear weights of a trained FloatLM in 8, 6, 4
and 3 bits, by GPTQ on 512 windows of its training text, the mean of three draws
of them; beside it rounding to nearest, and the TriLM of the same shape. As in
the paper grids are symmetric, 4 and 3 bits have a scale for 128 inputs (4.25
and 3.25 bits with it), 8 and 6 one for each output.

  machine   mini: two CPU cores, two runs of 500 steps, 75 s each by families.py
            (the table was not timed in quiet); the suite: as spectra.py says
  expected  mini, first 32,768 held-out tokens, nats a token (range of draws):
              FloatLM                 60.84 Mbit  3.4647
              8 bits  nearest, GPTQ   47.21       3.4646, 3.4648 (< 0.0001)
              6 bits  nearest, GPTQ   43.80       3.4649, 3.4648 (< 0.0001)
              4 bits  nearest, GPTQ   40.82       3.4669, 3.4666 (0.0005)
              3 bits  nearest, GPTQ   39.11       3.4805, 3.4737 (0.0009)
              TriLM                   36.27       3.3410
            (AMD EPYC Zen 4, two threads of a shared machine, 2026-11-22.) That
            the TriLM leads is a fact of this budget, see families.py: what
            quantising costs is each row less the FloatLM's
            the suite, by the paper: of 3.9B, mean of six tasks, FloatLM 61.4,
            8 bits 61.3, 6 bits 61.3, 4 bits 60.7, 3 bits 56.8, TriLM 60.7, at
            63.8, 34.4, 27.0, 20.6, 16.9 and 10.8 Gbit; no losses are printed
  command   tritera prepare stdlib data/quickstart --vocab-size 4096
            for name in floatlm trilm; do
              tritera train experiments/quantlm.py:$name
            done
            python experiments/quantlm.py runs/quantlm/floatlm \\
              runs/quantlm/trilm --tokens 32768
            (and so with runs/spectra/floatlm_3.9b and trilm_3.9b)

The mini runs differ from quickstart.py in steps and, of the FloatLM, in its
family and its schedule: the paper's cosine, at the better of two peaks in
families.py.
"""

import dataclasses
import math
from pathlib import Path
import statistics

import tyro

from tritera_jax import experiment_file
from tritera_jax.checkpoint import save
from tritera_jax.data import shards
from tritera_jax.eval import perplexity
from tritera_jax.experiment import Experiment, OptimizerConfig
from tritera_jax.generate import load
from tritera_jax.model import flops
from tritera_jax.quantlm import run as run_lib
from tritera_jax.quantlm.run import Quantization
from tritera_jax.ternary.quantize import Family
from tritera_jax.ternary.schedule import CosineSchedule

GROUPS = {8: None, 6: None, 4: 128, 3: 128}


def sweep() -> dict[str, Experiment]:
  base = experiment_file.load(str(Path(__file__).with_name('quickstart.py')))
  cosine = OptimizerConfig(CosineSchedule(1e-3, warmup_steps=50))
  return {
    'floatlm': mini(base, 'floatlm', 'float', cosine),
    'trilm': mini(base, 'trilm', 'ternary', base.optimizer),
  }


def mini(
  base: Experiment, name: str, family: Family, optimizer: OptimizerConfig
) -> Experiment:
  return dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, family=family),
    optimizer=optimizer,
    run=dataclasses.replace(
      base.run,
      folder=f'runs/quantlm/{name}',
      steps=500,
      evaluate_every=0,
      save_every=500,
    ),
  )


def main(
  floatlm: tyro.conf.Positional[Path],
  trilm: tyro.conf.Positional[Path],
  draws: int = 3,
  samples: int = 512,
  tokens: int | None = None,
):
  """Prints the table of a FloatLM, what is made of it, and a TriLM.

  Args:
    floatlm: run folder; quantised runs are written to its folder quantlm.
    trilm: run folder.
    draws: of calibration text.
    samples: windows of a draw.
    tokens: held-out ones to score, from the first; default: all. Bits a byte
      are by the bytes a token of all of them.
  """
  source = shards.open_split(perplexity.default_data(floatlm), 'validation')
  bits_per_nat = source.tokens / source.bytes / math.log(2)

  def loss(folder: Path) -> float:
    model = load.load(folder).model
    return perplexity.head_loss(
      model,
      source,
      tokens=tokens or source.tokens,
      sequence_length=model.config.context_length,
    )

  def row(name: str, bits: float, size: float, folders: list[Path]):
    nats = [loss(folder) for folder in folders]
    mean = statistics.mean(nats)
    print(
      f'| {name} | {bits:.2f} | {size / 1e6:,.2f} | {mean:.4f} '
      f'| {max(nats) - min(nats):.4f} | {mean * bits_per_nat:.4f} |',
      flush=True,
    )

  print(
    '| | bits a linear weight | Mbit | nats a token | range of draws '
    '| bits a byte |\n|---|---|---|---|---|---|'
  )
  for name, folder in (('FloatLM', floatlm), ('TriLM', trilm)):
    model = save.read_experiment(folder).model
    bits = flops.PAPER_BITS[model.family]
    row(name, bits, flops.size_bits(model), [folder])
  for bits, group in GROUPS.items():
    nearest = Quantization(bits, group, method='round_to_nearest')
    rounded = made(floatlm, f'nearest_{bits}', nearest)
    row(f'nearest, {bits} bits', *rounded[1:], [rounded.folder])
    reports = [
      made(
        floatlm,
        f'gptq_{bits}_{seed}',
        Quantization(bits, group, samples=samples, seed=seed),
      )
      for seed in range(draws)
    ]
    row(f'GPTQ, {bits} bits', *reports[0][1:], [r.folder for r in reports])


def made(floatlm: Path, name: str, how: Quantization) -> run_lib.Report:
  return run_lib.quantize(floatlm, floatlm / 'quantlm' / name, how)


if __name__ == '__main__':
  tyro.cli(main)
