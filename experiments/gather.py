# SPDX-License-Identifier: Apache-2.0
"""What does gathering 2-bit codes save under FSDP, in bytes and in time?

TriLM 3.9B of spectra.py, whose devices share every matrix, gathered in each of
the ways of run.gather: as XLA decides, as bfloat16, as 2-bit codes.

  machine   bytes: any, with libtpu (`pip install --no-deps libtpu==0.0.48`),
            by the TPU's own compiler, in a minute or so a program on two idle
            cores; time: 8 host devices, of one process or several
  expected  8.0 times fewer bytes than bfloat16 for the ternary matrices, 7.0
            times in all gathers: each matrix is gathered twice a part of a
            batch, the float head once, the embedding never (its rows are
            looked up where their columns lie). In all that is sent, with the
            float32 sums of gradients, 1.7 times.

            GB that a device sends a step, TriLM 3.9B (jax 0.11.2, libtpu
            0.0.48, one row of 2048 tokens a device, 2026-11-21):

                               v5e:2x4           v5e:16x16
                          bfloat16 two_bit   bfloat16 two_bit
              matrices     12.882   1.610     14.664   1.833
              gathers      13.154   1.883     14.975   2.143
              gradients    13.427  13.427     16.194  16.194
              exact means   0.050   0.050      0.061   0.061
              everything   26.654  15.383     31.542  18.711

            Time, bfloat16's over two_bit's by round, median (least, most), on
            two cores of a shared EPYC, where no network is to be waited for:
            8 host devices, 10 rounds: update 1.08 (0.84, 1.55), forward pass
            1.02 (0.89, 1.67), one matrix 0.98 (0.92, 1.26). 2 processes of a
            device over gloo, 20 rounds beside other work: 0.93 (0.65, 1.53),
            0.90 (0.29, 2.13), 1.19 (0.84, 1.88). It shows no loss or gain.

  command   python experiments/gather.py bytes --topology v5e:16x16
            python experiments/gather.py time --processes 2
            tritera train experiments/gather.py:two_bit --data.path DATASET

It differs from spectra.py in how the model is laid out alone: nothing that is
learned depends on it.
"""

import argparse
from collections.abc import Iterator
import dataclasses
import json
import os
from pathlib import Path
import socket
import statistics
import subprocess
import sys
import time
import typing

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

from tritera_jax import experiment_file
from tritera_jax.experiment import Experiment
from tritera_jax.parallel import collectives, gather, rules
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.gather import Gather
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import step

KINDS: tuple[Gather, ...] = typing.get_args(Gather)


def sweep() -> dict[str, Experiment]:
  base = experiment_file.load(f'{Path(__file__).parent}/spectra.py:trilm_3.9b')
  return {
    kind: dataclasses.replace(
      base,
      run=dataclasses.replace(
        base.run, folder=f'runs/gather/{kind}', remat='block', gather=kind
      ),
      mesh=MeshConfig(fsdp=-1),
    )
    for kind in KINDS
  }


def of_rows(experiment: Experiment, rows: int) -> Experiment:
  """The experiment with so many rows a batch."""
  data = dataclasses.replace(experiment.data, batch_size=rows)
  return dataclasses.replace(experiment, data=data)


def program(experiment: Experiment, mesh) -> jax.stages.Compiled:
  """The compiled update."""
  data = experiment.data
  tokens = jax.ShapeDtypeStruct(
    (data.batch_size, data.sequence_length + 1),
    jnp.int32,
    sharding=step.batch_sharding(mesh),
  )
  state = step.abstract_state(experiment, mesh)
  return (
    step.jitted(experiment, mesh)
    .lower(state, tokens, jax.ShapeDtypeStruct((), jnp.int32))
    .compile()
  )


def sent(experiment: Experiment, compiled) -> dict[str, int]:
  """Bytes that a device sends in one update.

  Of 'auto' on TPUs the last alone says much: XLA makes permutes of gathers and
  sums, to multiply the parts as they arrive.
  """
  found = collectives.of(compiled)
  layers = experiment.model.layers
  gathers = [one for one in found if one.op == 'all-gather']
  sums = {
    'matrices_gathered': [one for one in gathers if one.times >= layers],
    'gathered': gathers,
    'gradients_reduced': [
      one
      for one in found
      if one.op in ('reduce-scatter', 'all-reduce')
      and one.results[0].dtype != 's32'
    ],
    'exact_means': [
      one
      for one in found
      if one.op == 'all-reduce' and one.results[0].dtype == 's32'
    ],
    'all': found,
  }
  return {
    name: sum(collectives.bytes_per_device(ones).values())
    for name, ones in sums.items()
  }


def bytes_of(kinds: list[Gather], topology: str, rows: int) -> Iterator[dict]:
  """Of each kind, compiled ahead of time for a TPU topology."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  mesh = mesh_lib.make_mesh(MeshConfig(fsdp=-1), devices)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    for kind in kinds:
      started = time.perf_counter()
      experiment = of_rows(sweep()[kind], rows * len(devices))
      compiled = program(experiment, mesh)
      memory = compiled.memory_analysis()
      yield {
        'gather': kind,
        'topology': topology,
        'devices': len(devices),
        'rows_a_device': rows,
        **sent(experiment, compiled),
        'temporary_bytes': memory.temp_size_in_bytes if memory else None,
        'compile_seconds': round(time.perf_counter() - started),
      }


def small(rows: int, kind: Gather) -> Experiment:
  """What two cores update in a second, with a batch that costs them little."""
  base = sweep()[kind]
  model = dataclasses.replace(
    base.model, vocab_size=1000, layers=4, d_model=384, d_ff=1152, heads=3,
    kv_heads=3, context_length=16,
  )  # fmt: skip
  data = dataclasses.replace(base.data, batch_size=rows, sequence_length=16)
  return dataclasses.replace(base, model=model, data=data)


def one_matrix(kind: Gather, mesh) -> jax.stages.Compiled:
  """Codes of the model's widest matrix, as they lie, to what is multiplied."""
  spec = sweep()[kind].model.linears['mlp.up']
  shape = (spec.in_features, spec.out_features)

  def arrive(codes_KN):
    way = gather.exchange(kind, spec.axes)
    if way is not None:
      codes_KN = way.gather(way.pack(codes_KN), shape)
    whole_KN = rules.constrain(codes_KN, (None, spec.axes[1]))
    return whole_KN.astype(jnp.bfloat16)

  lies = rules.shardings(mesh, spec.axes)
  codes = jax.ShapeDtypeStruct(shape, jnp.int8, sharding=lies)
  return jax.jit(arrive).lower(codes).compile()


def times_of(kinds: list[Gather], rounds: int, steps: int) -> Iterator[dict]:
  """Of each kind, turn by turn: an update, its forward pass, one matrix."""
  mesh = mesh_lib.make_mesh(MeshConfig(fsdp=-1))
  rows = mesh.devices.size
  with jax.set_mesh(mesh):
    tokens = jax.make_array_from_callback(
      (rows, 17),
      step.batch_sharding(mesh),
      lambda index: np.zeros((rows, 17), np.int32)[index],
    )
    state = step.jitted_init(small(rows, kinds[0]), mesh)()
    programs = {}
    for kind in kinds:
      experiment = small(rows, kind)
      programs[kind, 'update'] = program(experiment, mesh)
      programs[kind, 'forward'] = (
        jax.jit(
          lambda params, tokens, e=experiment: step._mean_loss(
            e, params, tokens
          )[0]
        )
        .lower(state.params, tokens)
        .compile()
      )
      programs[kind, 'matrix'] = one_matrix(kind, mesh)
    matrix = programs[kinds[0], 'matrix'].input_shardings[0][0]
    codes = jax.jit(
      lambda: jnp.ones((3072, 9216), jnp.int8), out_shardings=matrix
    )()
    seconds = {key: [] for key in programs}
    n = 0
    for round in range(rounds + 1):
      for (kind, what), run in programs.items():
        started = time.perf_counter()
        for _ in range(steps):
          if what == 'update':
            state, done = run(state, tokens, jnp.int32(n))
            n += 1
          else:
            done = run(codes) if what == 'matrix' else run(state.params, tokens)
        jax.block_until_ready(done)
        if round:  # the first one warms up
          seconds[kind, what].append((time.perf_counter() - started) / steps)
  for (kind, what), values in seconds.items():
    peer = seconds['bfloat16', what]
    ratios = [a / b for a, b in zip(peer, values, strict=True)]
    yield {
      'gather': kind,
      'of': what,
      'devices': rows,
      'processes': jax.process_count(),
      'rounds': rounds,
      **sent(small(rows, kind), programs[kind, what]),
      'milliseconds': spread(values, 1e3),
      'bfloat16_over_it': spread(ratios, 1),
    }


def spread(values: list[float], unit: float) -> dict[str, float]:
  return {
    'median': round(unit * statistics.median(values), 3),
    'min': round(unit * min(values), 3),
    'max': round(unit * max(values), 3),
  }


def start_processes(count: int) -> list[subprocess.Popen]:
  """Others like this one, each with its share of the devices."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  return [
    subprocess.Popen(
      [sys.executable, *sys.argv, '--process', f'{n},127.0.0.1:{port}']
    )
    for n in range(count)
  ]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('what', choices=('bytes', 'time'))
  parser.add_argument('--gather', nargs='+', choices=KINDS, default=KINDS)
  parser.add_argument('--topology', default='v5e:16x16')
  parser.add_argument('--rows', type=int, default=1, help='of a device')
  parser.add_argument('--devices', type=int, default=8, help='of the host')
  parser.add_argument('--processes', type=int, default=1)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--process', default='', help='N,HOST:PORT; its own')
  options = parser.parse_args()
  if options.what == 'time' and 'bfloat16' not in options.gather:
    parser.error('--gather must name bfloat16, the peer of all ratios')
  if options.processes > 1 and not options.process:
    children = start_processes(options.processes)
    try:
      raise SystemExit(max(child.wait() for child in children))
    finally:
      for child in children:
        child.kill()
  jax.config.update('jax_platforms', 'cpu')
  if options.what == 'bytes':
    lines = bytes_of(options.gather, options.topology, options.rows)
  else:
    jax.config.update(
      'jax_num_cpu_devices', options.devices // options.processes
    )
    if options.process:
      number, coordinator = options.process.split(',')
      jax.distributed.initialize(coordinator, options.processes, int(number))
    lines = times_of(options.gather, options.rounds, options.steps)
  for line in lines:
    if jax.process_index() == 0:
      print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
