# SPDX-License-Identifier: Apache-2.0
"""Does a ternary model's loss decelerate, and do its tokens then disagree?

arXiv 2506.05447 finds that losses of float models fall by a power law, then by
a far slower one, and that at the break the gradients of tokens begin to cancel
each other. Here a TriLM beside its FloatLM twin: the same data in the same
order, the same rate, constant after warm-up as there.

  machine   mini: 2 CPU cores, six minutes each. trilm and floatlm, of the
            paper's 14M shape on 137B tokens: not run
  expected  both decelerate; one seed each (AMD EPYC Zen 4, 2026-11-22):
              steps           t_d       L_d          r_d     c0 before it
              TriLM   4096  701+-37  3.972+-.028  .084+-.003  .158+-.003
                      2048  704+-53  3.968+-.047  .083+-.009  .158+-.004
              FloatLM 4096  835+-43  4.015+-.027  .097+-.002  .150+-.002
                      2059  846+-48  4.007+-.031  .095+-.006  .150+-.002
            RSLE .008, .008, .009, .009; without a break .021, .015, .017, .013.
            Again from a clean clone on an Intel Xeon, 2026-11-30: t_d 677+-40
            and 836+-42, L_d 3.985 and 4.014, r_d .084 and .096.
            D of held-out losses over a doubling of the steps rises ahead of
            the break: TriLM's from .36 at step 64 to .80 at 512, FloatLM's
            from .43 to .74, while M stays at 1 nat. D of 256 tokens' gradients
            falls to .85 at steps 128 to 256 and rises to .88 and .87 by 512;
            of independent ones it would be .94.
            What gradients predict of an update follows what tokens gain by it
            with a correlation of .92 or more in FloatLM, steps 64 to 2,048. In
            TriLM, whose gradients are straight-through, it is .88 to .94 until
            step 512 and .46 to .63 after the break.
  command   tritera prepare stdlib data/quickstart --vocab-size 4096
            for one in mini_trilm mini_floatlm; do
              tritera train experiments/dynamics.py:$one
              tritera dynamics runs/dynamics/$one --curve.guess 1000 \\
                --tokens.losses 8192 --tokens.gradients 256
            done
            python experiments/dynamics.py compare \\
              runs/dynamics/mini_trilm runs/dynamics/mini_floatlm
            python experiments/dynamics.py published

`published` regenerates the paper's eight laws from its table, whose two places
leave L_d open by 4 % and r_d by 0.01, and recovers them from noise of their
RSLE. --curves FILE fits the smoothed losses that its authors published
(github.com/mirandrom/zsl, analyses/01-deceleration/fig/bnsl_fit.json): then
L_d, r_d, Lhat_T, RSLE and the parameters' errors are the paper's to its last
digit, t_d to two steps (2026-11-22).

It differs from families.py in the schedule, and in which checkpoints are kept.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model.config import ModelConfig
from tritera_jax.scaling.dynamics import deceleration, files, report
from tritera_jax.scaling.dynamics.deceleration import Curve, Deceleration
from tritera_jax.ternary.quantize import Family
from tritera_jax.ternary.schedule import InfiniteSchedule

FAMILIES: dict[str, Family] = {'trilm': 'ternary', 'floatlm': 'float'}

# The paper's two tables: b, c0, c1, log d1, f1, L_d, t_d, r_d, Lhat_T, RSLE;
# and T, the last step of the losses that its authors published.
PAPER = {
  '14M': (18.42, .17, -.16, 8.68, .20, 4.05, 5877, .013, 3.86, .011, 262153),
  '37M': (19.64, .20, -.18, 8.68, .24, 3.60, 5907, .016, 3.39, .015, 262153),
  '78M': (20.66, .21, -.19, 8.69, .29, 3.38, 5928, .020, 3.14, .014, 262153),
  '144M': (20.31, .21, -.19, 8.71, .34, 3.25, 6074, .023, 2.98, .015, 262209),
  '285M': (20.85, .22, -.20, 8.57, .44, 3.14, 5264, .025, 2.85, .013, 262451),
  '472M': (21.16, .23, -.19, 8.44, .39, 3.16, 4644, .035, 2.77, .014, 188556),
  '1B': (25.97, .27, -.23, 8.22, .76, 2.86, 3717, .034, 2.39, .008, 738016),
  '7B': (27.49, .28, -.22, 8.44, .76, 2.64, 4627, .053, 2.04, .008, 557000),
}  # fmt: skip


def constant(rate: float, warmup_steps: int) -> InfiniteSchedule:
  """Warm-up, then always `rate`: a cooldown from a peak that is no higher."""
  return InfiniteSchedule(rate, rate, rate, warmup_steps, cooldown_steps=0)


def mini(prefix: str) -> Experiment:
  return Experiment(
    ModelConfig(
      family=FAMILIES[prefix],
      vocab_size=4096,
      layers=2,
      d_model=128,
      d_ff=384,
      heads=2,
      kv_heads=2,
      head_dim=64,
      context_length=128,
    ),
    DataConfig('data/quickstart', batch_size=8, sequence_length=128),
    OptimizerConfig(constant(2e-3, warmup_steps=50)),
    RunConfig(
      f'runs/dynamics/mini_{prefix}',
      steps=4096,
      log_every=1,
      save_share=1.0,
      keep_powers=True,
      tensorboard=False,
    ),
  )


def paper(prefix: str) -> Experiment:
  """The 14M of the paper, but for its tied embeddings and its tokenizer."""
  base = mini(prefix)
  return Experiment(
    dataclasses.replace(
      base.model,
      vocab_size=50_277,
      layers=4,
      d_model=256,
      d_ff=1024,
      heads=4,
      kv_heads=4,
      context_length=1024,
      dtype='bfloat16',
    ),
    DataConfig('data/slimpajama', batch_size=512, sequence_length=1024),
    OptimizerConfig(constant(1.26e-3, warmup_steps=2000)),
    dataclasses.replace(
      base.run, folder=f'runs/dynamics/{prefix}', steps=262_144
    ),
  )


def sweep() -> dict[str, Experiment]:
  return {f'mini_{prefix}': mini(prefix) for prefix in FAMILIES} | {
    prefix: paper(prefix) for prefix in FAMILIES
  }


def _line(name: str, law: Deceleration, note: str) -> str:
  e = law.errors
  return (
    f'{name:<8} t_d {law.t_d:6,.0f} +- {e["t_d"]:3.0f}  '
    f'L_d {law.L_d:.3f} +- {e["L_d"]:.3f}  r_d {law.r_d:.4f} +- '
    f'{e["r_d"]:.4f}  Lhat_T {law.extrapolated(law.steps):.3f}  '
    f'RSLE {law.rsle:.4f}  {note}'
  )


def published(curves: Path | None):
  given = json.loads(curves.read_text()) if curves else None
  for n, (name, row) in enumerate(PAPER.items()):
    law = Deceleration(*row[:5])
    L_d, t_d, r_d, L_hat, rsle, T = row[5:]
    if given is None:
      steps, _ = deceleration.smoothed(np.arange(1, T + 1), np.ones(T), Curve())
      noise = np.random.default_rng(n).normal(0, rsle, len(steps))
      exact = deceleration.fit_smoothed(steps, law.loss(steps))
      found = deceleration.fit_smoothed(steps, law.loss(steps) * np.exp(noise))
      worst = max(
        abs(getattr(exact, field) / getattr(law, field) - 1)
        for field in ('b', 'c0', 'c1', 'log_d1', 'f1')
      )
      note = (
        f'of t_d {law.t_d:,.0f}, L_d {law.L_d:.3f}, r_d {law.r_d:.2f} '
        f'(without noise: parameters within {worst:.0e})'
      )
    else:
      smooth = given[name if name in given else f'OLMo-{name}']['smoothed_loss']
      points = dict(zip(smooth['x'], smooth['y'], strict=True))  # no step twice
      steps = [step for step in points if step > Curve().after]
      found = deceleration.fit_smoothed(steps, [points[s] for s in steps])
      note = f'L_T {found.final_loss:.3f}'
    print(_line(name, found, note))
    print(
      f'{"paper":>8} t_d {t_d:6,}         L_d {L_d:.2f}            r_d '
      f'{r_d:.3f}             Lhat_T {L_hat:.2f}   RSLE {rsle:.3f}'
    )


def compare(runs: tuple[Path, ...], out: Path, curve: Curve):
  found = {run.name: files.read(run / 'dynamics', curve) for run in runs}
  for name, one in found.items():
    print(f'{name}\n{report.text(one)}\n')
  for path in report.write(found, out):
    print(path)


def main(
  what: tyro.conf.Positional[Literal['published', 'compare']],
  runs: tyro.conf.Positional[tuple[Path, ...]] = (),
  out: Path = Path('runs/dynamics'),
  curve: Curve = Curve(guess=1000),
  curves: Path | None = None,
):
  """The paper's laws recovered, or runs of ours in one picture.

  Args:
    what: published or compare.
    runs: run folders to compare, each with what `tritera dynamics` measured.
    out: folder for their pictures and JSON.
    curve: how their losses are fitted.
    curves: the authors' bnsl_fit.json, fitted in place of the table's laws.
  """
  if what == 'published':
    published(curves)
  else:
    compare(runs, out, curve)


if __name__ == '__main__':
  tyro.cli(main)
