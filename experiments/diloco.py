# SPDX-License-Identifier: Apache-2.0
"""What do workers lose that agree every 30 steps, and what do they save?

The quickstart's shape and corpus at 480 steps (0.49M tokens): four workers of
two rows each (optimizer.diloco), beside all four agreeing every step.

  machine   2 CPU cores: four processes, of one device each; two minutes for
            120 steps
  expected  after 120 steps, four agreements, nats a token on held-out text:
            together_muon 5.860, muloco 6.132, muloco_2 6.154 (the same to 1e-7
            in four processes and in one). Bytes that a worker sends a step on
            average: 22,814,220 together, 760,492 muloco, 193,912 muloco_4,
            98,885 muloco_2. (AMD EPYC, 2026-11-21; 480 steps were not run)
  command   make quickstart   (for the dataset)
            for n in 0 1 2 3; do
              tritera train experiments/diloco.py:muloco_2 \\
                --coordinator 127.0.0.1:8476 --processes 4 --process $n &
            done; wait
            python experiments/diloco.py   (the bytes, by the compiled program)

It differs from quickstart.py in steps, optimizer and mesh.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax

from tritera_jax import experiment_file
from tritera_jax.experiment import DiLoCoConfig, Experiment, MuonConfig
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import step

WORKERS = 4


def sweep() -> dict[str, Experiment]:
  muon = MuonConfig()
  return {
    'together': experiment('together', None, None),
    'together_muon': experiment('together_muon', muon, None),
    'diloco': experiment('diloco', None, 32),
    'muloco': experiment('muloco', muon, 32),
    'muloco_4': experiment('muloco_4', muon, 4),
    'muloco_2': experiment('muloco_2', muon, 2),
  }


def experiment(
  name: str, muon: MuonConfig | None, bits: Literal[2, 4, 32] | None
) -> Experiment:
  base = experiment_file.load(str(Path(__file__).with_name('quickstart.py')))
  diloco = bits and DiLoCoConfig(WORKERS, every=30, bits=bits)
  return dataclasses.replace(
    base,
    optimizer=dataclasses.replace(
      base.optimizer, muon=muon, diloco=diloco or None
    ),
    run=dataclasses.replace(
      base.run,
      folder=f'runs/diloco/{name}',
      steps=480,
      evaluate_every=120,
      save_every=240,
    ),
    mesh=MeshConfig(data=WORKERS, fsdp=1),
  )


def sent(experiment: Experiment) -> tuple[int, int]:
  """Bytes that a worker sends in a step, and what an agreement adds to it."""
  mesh = mesh_lib.make_mesh(experiment.mesh)
  tokens = jax.ShapeDtypeStruct(
    (experiment.data.batch_size, experiment.data.sequence_length + 1), 'int32'
  )
  with jax.set_mesh(mesh):
    state = step.abstract_state(experiment, mesh)
    compiled = step.jitted(experiment, mesh).lower(state, tokens, 0).compile()
  found = collectives.of(compiled)
  inside = [one for one in found if '/cond/' in one.source]
  rest = [one for one in found if '/cond/' not in one.source]
  every, agreeing = (
    sum(one.bytes * one.times for one in each) for each in (rest, inside)
  )
  return every, agreeing


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', WORKERS)
  for name, one in sweep().items():
    every, agreeing = sent(one)
    diloco = one.optimizer.diloco
    mean = every + (agreeing / diloco.every if diloco else 0)
    print(
      f'{name:<14} {every:>12,} bytes a step, {agreeing:>12,} an agreement; '
      f'{mean:>12,.0f} a step on average'
    )
