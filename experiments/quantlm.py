# SPDX-License-Identifier: Apache-2.0
import dataclasses
from pathlib import Path

from tritera_jax import experiment as experiment_lib
from tritera_jax.experiment import Experiment, OptimizerConfig
from tritera_jax.ternary.schedule import CosineSchedule


def sweep() -> dict[str, Experiment]:
  base = experiment_lib.load(str(Path(__file__).with_name('quickstart.py')))
  optimizer = {
    'trilm': base.optimizer,
    'floatlm': OptimizerConfig(CosineSchedule(1e-3, warmup_steps=50)),
  }
  family = {'trilm': 'ternary', 'floatlm': 'float'}
  return {
    f'mini_{name}': dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, family=family[name]),
      optimizer=optimizer[name],
      run=dataclasses.replace(
        base.run,
        folder=f'runs/quantlm/{name}',
        steps=500,
        evaluate_every=0,
        save_every=500,
      ),
    )
    for name in optimizer
  }
