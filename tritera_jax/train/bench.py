# SPDX-License-Identifier: Apache-2.0
"""What ternary training costs beside its float twin, on this machine.

  python -m tritera_jax.train.bench experiments/quickstart.py

Times, turn by turn in one process: a step of the experiment, one of its
FloatLM and BiLM twins of the same shapes, and one reading of the ternary
statistics. Prints medians and spreads of the ratios, as JSON lines.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
import time

import jax
import numpy as np

from tritera_jax import experiment as experiment_lib
from tritera_jax.experiment import Experiment
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.ternary.quantize import Family
from tritera_jax.train import metrics, step


class _Stepper:
  """One family's training, a few steps a call."""

  def __init__(self, experiment: Experiment, mesh: jax.sharding.Mesh):
    data, model = experiment.data, experiment.model
    self.experiment, self.n = experiment, 0
    self.state = step.jitted_init(experiment, mesh)()
    self.update = step.jitted(experiment, mesh)
    self.tokens = np.random.default_rng(0).integers(
      0, model.vocab_size, (data.batch_size, data.sequence_length + 1)
    )

  def seconds(self, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
      self.state, measured = self.update(
        self.state, self.tokens.astype(np.int32), self.n
      )
      self.n += 1
    jax.block_until_ready(measured)
    return (time.perf_counter() - started) / steps

  def telemetry_seconds(self) -> float:
    started = time.perf_counter()
    model = self.experiment.model
    before = metrics.codes_and_scales(model, self.state.params)
    metrics.telemetry(model, self.state.params, before)
    return time.perf_counter() - started


def _twin(experiment: Experiment, family: Family) -> Experiment:
  """The same shapes in another family; it has no codes to gather if float."""
  run = experiment.run
  if family == 'float' and run.gather == 'two_bit':
    run = dataclasses.replace(run, gather='auto')
  model = dataclasses.replace(experiment.model, family=family)
  return dataclasses.replace(experiment, model=model, run=run)


def ratios(
  experiment: Experiment, rounds: int, steps: int
) -> dict[str, list[float]]:
  """Times of each round over those of the experiment's own step."""
  if experiment.model.family != 'ternary':
    raise ValueError(
      f'model.family={experiment.model.family!r} has no twin to beat; name a '
      "'ternary' experiment"
    )
  mesh = mesh_lib.make_mesh(experiment.mesh)
  found = {name: [] for name in ('float', 'binary', 'telemetry', 'seconds')}
  families: tuple[Family, ...] = ('ternary', 'float', 'binary')
  with jax.set_mesh(mesh):
    steppers = {
      family: _Stepper(_twin(experiment, family), mesh) for family in families
    }
    for stepper in steppers.values():
      stepper.seconds(2)  # compiles
    steppers['ternary'].telemetry_seconds()
    for _ in range(rounds):
      own = steppers['ternary'].seconds(steps)
      found['seconds'].append(own)
      for family in ('float', 'binary'):
        found[family].append(own / steppers[family].seconds(steps))
      found['telemetry'].append(steppers['ternary'].telemetry_seconds() / own)
  return found


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('experiment')
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--steps', type=int, default=10)
  options = parser.parse_args()
  device = jax.devices()[0].device_kind
  print(
    json.dumps(
      {
        'command': ' '.join(sys.argv),
        'date': datetime.date.today().isoformat(),
        'devices': f'{jax.device_count()} x {device}',
      }
    )
  )
  experiment = experiment_lib.load(options.experiment)
  names = {
    'seconds': 'seconds of a TriLM step',
    'float': 'TriLM step / FloatLM step',
    'binary': 'TriLM step / BiLM step',
    'telemetry': 'one reading of telemetry / TriLM step',
  }
  found = ratios(experiment, options.rounds, options.steps)
  for key, name in names.items():
    values = sorted(found[key])
    print(
      json.dumps(
        {
          'name': name,
          'median': round(statistics.median(values), 4),
          'min': round(values[0], 4),
          'max': round(values[-1], 4),
        }
      )
    )


if __name__ == '__main__':
  main()
