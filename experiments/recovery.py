# SPDX-License-Identifier: Apache-2.0
"""Do the papers' laws come back from twenty noisy losses, and how surely?

Losses are drawn from Spectra 1.1's laws of TriLM and FloatLM on the grid of
its fit, five sizes on four budgets, with 0.5 % of normal noise in each log
loss; fitted with least squares and with Huber's loss as in Chinchilla; and it
is counted how often each kind of interval covers the truth. Then the final
losses that MuLoCo's paper (2505.23725, one worker) gives for three optimizers
at five sizes are fitted with the law of N alone.

The paper's grid has five of Spectra's six sizes from 99M to 1.1B; which, and
which budgets, is not known. Here 560M is missing, in the middle, and budgets
are 20, 50, 100 and 150e9 tokens. N is counted without embeddings, as readers
of the paper say of its constants.

  machine   one CPU core, two minutes of it
  expected  (one thread of an AMD EPYC Zen 4, 2026-11-22) with least squares,
            200 draws, binomial error 2.1, coverage of 90 % intervals:

              TriLM            E     A  alpha     B  beta     L
              profile       91.5  91.0   92.5  92.0  90.5  92.5
              runs          89.0  91.0   92.5  90.0  90.0  90.5
              residuals     90.5  85.5   89.0  88.0  88.5  91.0
              raw residuals 86.5  81.5   83.5  87.0  84.0  85.5

              FloatLM          E     A  alpha     B  beta     L
              profile       92.5  91.5   91.5  92.0  91.5  92.5
              runs          89.5  92.5   91.5  89.5  90.0  89.5
              residuals     89.5  87.5   90.0  90.0  89.5  89.0
              raw residuals 87.0  82.0   83.0  86.0  86.0  87.0

            and with Huber's loss, TriLM and FloatLM alike, profile 90.5 to
            93.0, runs 94.5 to 97.0, residuals 80.5 to 87.5. So the profile is
            the default, resampled runs are a sample of laws to trust, and
            resampled residuals are not with Huber's loss.

            The median 90 % interval of TriLM's alpha is 0.27 to 0.37 and of
            its beta 0.63 to 1.00; of FloatLM's 0.50 to 0.62 and 0.41 to 0.66.
            The floors of MuLoCo's three optimizers, 1.69, 1.71 and 1.62, are
            not told apart by five sizes each: 90 % is 1.35 to 1.86 in all.
  command   python experiments/recovery.py
            python experiments/recovery.py --draws 20 --resamples 40  (mini)

It differs from the other experiments in that nothing is trained.
"""

import dataclasses
import time
from typing import Literal

import numpy as np
import tyro

from tritera_jax.scaling import fit as fit_lib
from tritera_jax.scaling import intervals, laws
from tritera_jax.scaling.fit import SQUARES, Fit
from tritera_jax.scaling.laws import BILLION, MILLION, ChinchillaLaw
from tritera_jax.scaling.points import Points

UNITS = {'parameters': MILLION, 'tokens': BILLION}
# Spectra, Table 3: d_model, d_ff, layers.
SHAPES = (
  (512, 1280, 16),
  (768, 2048, 16),
  (1024, 2560, 24),
  (1536, 4096, 24),
  (1792, 5120, 24),
)
TOKENS = (20e9, 50e9, 100e9, 150e9)
# N and D to extrapolate to, as Spectra 1.1's largest has.
BEYOND = (3.3e9, 1.2e12)
THERE = Points.of_arrays(
  BEYOND[0], 1.0, family='drawn', counted='without_embeddings',
  tokens=BEYOND[1],
)  # fmt: skip
# Nats a token at the end.
MULOCO_SIZES = (150e6, 416e6, 914e6, 1.76e9, 3.1e9)
MULOCO = {
  'muloco': (3.120, 2.638, 2.400, 2.238, 2.122),
  'muon': (3.124, 2.641, 2.402, 2.246, 2.128),
  'adamw': (3.158, 2.682, 2.440, 2.266, 2.145),
}


def draws_of(
  law: ChinchillaLaw, draws: int, noise: float, seed: int
) -> tuple[Points, np.ndarray]:
  """The grid, with the first draw's losses, and losses (draws, 20)."""
  sizes = [layers * d * (4 * d + 3 * f) for d, f, layers in SHAPES]
  N_R, D_R = (each.ravel() for each in np.meshgrid(sizes, TOKENS))
  random = np.random.default_rng(seed).normal(size=(draws, len(N_R)))
  losses = law(N_R, D_R) * np.exp(noise * random)
  points = Points.of_arrays(
    N_R, losses[0], family='drawn', counted=law.counted, tokens=D_R
  )
  return points, losses


def resampled(
  fit: Fit, kind: str, resamples: int, seed: int, level: float
) -> tuple[np.ndarray, np.ndarray]:
  """Ends of a bootstrap's intervals: of the constants, and of BEYOND's loss."""
  if kind == 'raw residuals':
    rng = np.random.default_rng(seed)
    fitted_R = np.log(fit.points.losses) - fit.residuals
    noise = rng.choice(fit.residuals, (resamples, len(fitted_R)))
    theta = fit_lib.refit(fit, np.exp(fitted_R + noise))
  else:
    theta = intervals.bootstrap(
      fit, draws=resamples, seed=seed,
      resample='runs' if kind == 'runs' else 'residuals',
    )  # fmt: skip
  ends = intervals.percentiles(fit, theta, level=level, **UNITS)
  beyond = np.exp(fit_lib.form_at(fit, THERE).log_loss(theta)[:, -1])
  tail = (1 - level) / 2
  low, high = np.quantile(beyond, [tail, 1 - tail])
  return (
    np.array([each.low for each in ends.values()] + [low]),
    np.array([each.high for each in ends.values()] + [high]),
  )


def recover(
  law: ChinchillaLaw,
  delta: float,
  *,
  draws: int,
  resamples: int,
  noise: float,
  level: float,
  seed: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Ends (draws, 6) of each kind of interval: five constants, and a loss.

  'estimate' has the estimates twice.
  """
  points, losses = draws_of(law, draws, noise, seed)
  fits = [
    fit_lib.chinchilla(dataclasses.replace(points, losses=each), delta=delta)
    for each in losses
  ]
  theta = np.stack([fit.theta for fit in fits])
  low, high = intervals.profiles(fits[0], theta, losses, level=level, **UNITS)
  beyond = np.full((draws, 3), np.nan)
  if delta == SQUARES:  # of Huber's loss it takes ten times as long
    found = [intervals.predictions(fit, THERE, level=level)[0] for fit in fits]
    beyond = np.array([(one.estimate, one.low, one.high) for one in found])
  constants = [[*fit.constants(**UNITS).values()] for fit in fits]
  estimate = np.column_stack([constants, beyond[:, 0]])
  ends = {
    'estimate': (estimate, estimate),
    'profile': (
      np.column_stack([low, beyond[:, 1]]),
      np.column_stack([high, beyond[:, 2]]),
    ),
  }
  for kind in ('runs', 'residuals', 'raw residuals'):
    both = [
      resampled(fit, kind, resamples, seed + n, level)
      for n, fit in enumerate(fits)
    ]
    ends[f'bootstrap of {kind}'] = (
      np.stack([low for low, _ in both]), np.stack([high for _, high in both])
    )  # fmt: skip
  return ends


LAWS = {
  'TriLM': laws.TRILM_SPECTRA_1_1,
  'FloatLM': laws.FLOATLM_SPECTRA_1_1,
}
DELTAS = {'squares': SQUARES, 'huber': 1e-3}


def main(
  only_laws: tuple[Literal['TriLM', 'FloatLM'], ...] = ('TriLM', 'FloatLM'),
  methods: tuple[Literal['squares', 'huber'], ...] = ('squares', 'huber'),
  draws: int = 200,
  resamples: int = 200,
  noise: float = 0.005,
  level: float = 0.9,
  seed: int = 0,
):
  """Prints what is recovered and how often intervals cover.

  Args:
    only_laws: to draw from.
    methods: least squares of log losses, and Huber's loss with delta 1e-3.
    draws: sets of twenty losses.
    resamples: of each bootstrap.
    noise: standard deviation of log losses.
    level: of confidence.
    seed: of the draws.
  """
  error = 100 * np.sqrt(level * (1 - level) / draws)
  print(
    f'{draws} draws of 20 losses, noise {noise:.2%}; coverage in % of '
    f'{level:.0%} intervals, with a binomial error of {error:.1f}. N in '
    'millions without embeddings, D in billions of tokens; L is the loss of '
    f'{BEYOND[0] / BILLION:g}e9 parameters after {BEYOND[1]:g} tokens.'
  )
  for name in only_laws:
    law = LAWS[name]
    truth = np.array([*law.constants(**UNITS).values(), law(*BEYOND)])
    for method in methods:
      start = time.process_time()
      ends = recover(
        law, DELTAS[method], draws=draws, resamples=resamples, noise=noise,
        level=level, seed=seed,
      )  # fmt: skip
      took = time.process_time() - start
      print(f'\n{name}, {method} ({took:.0f} s of CPU time)')
      row('', ['E', 'A', 'alpha', 'B', 'beta', 'L'])
      row('truth', [f'{value:.3f}' for value in truth])
      found, _ = ends.pop('estimate')
      row('median estimate', [f'{x:.3f}' for x in np.median(found, 0)])
      for side, values in zip(('low', 'high'), ends['profile'], strict=True):
        row(f'median {side}', [f'{x:.3f}' for x in np.median(values, 0)])
      for kind, (low, high) in ends.items():
        covered = 100 * ((low <= truth) & (truth <= high)).mean(0)
        covered[np.isnan(low).any(0)] = np.nan
        row(kind, [f'{value:.1f}' for value in covered])
  print('\nE + A / N^alpha of published losses, N in millions')
  row('', ['E', 'A', 'alpha', 'noise'])
  for name, losses in MULOCO.items():
    points = Points.of_arrays(MULOCO_SIZES, losses, family=name, counted='all')
    fit = fit_lib.power_law(points)
    ends = intervals.profile(fit, level=level, parameters=MILLION)
    values = [f'{each.estimate:.3f}' for each in ends.values()]
    row(name, [*values, f'{fit.noise:.2%}'])
    row('  low', [f'{each.low:.3f}' for each in ends.values()])
    row('  high', [f'{each.high:.3f}' for each in ends.values()])


def row(name: str, cells: list[str]):
  cells = ['-' if cell == 'nan' else cell for cell in cells]
  print(f'{name:<26}' + ''.join(f'{cell:>9}' for cell in cells))


if __name__ == '__main__':
  tyro.cli(main)
