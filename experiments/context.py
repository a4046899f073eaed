# SPDX-License-Identifier: Apache-2.0
"""What does splitting sequences over devices change, and what does it cost?

One batch of long sequences of a small TriLM whose documents are kept apart:
its loss, its gradient, the memory of a device and what it sends, on 1 device
and with mesh.context of 2, 4 and 8.

  machine   any, with 8 GB for the single device; --compile-only needs none
  expected  losses within 2e-7, gradients within 1e-6 of one device's (relative
            norm; float32 sums in another order). Of 8,192 tokens 8.0 GB of
            temporary memory on one device, whose scores are whole; 571, 165
            and 59 MB on 2, 4 and 8, and 9.5, 11.7 and 12.2 MB sent round the
            ring by each. (32,768 tokens: 125 GB; 8.0, 2.1 and 0.7 GB)
  command   python experiments/context.py --sequence-length 8192
            python experiments/context.py --sequence-length 32768 --compile-only
            tritera train experiments/context.py:8 --data.path DATASET

It differs from quickstart.py in the length of its sequences and in its mesh.
"""

import argparse
import dataclasses
import datetime
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tritera_jax.experiment import (
  DataConfig,
  Experiment,
  OptimizerConfig,
  RunConfig,
)
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.ternary.schedule import TriLMSchedule
from tritera_jax.train import step

SEPARATOR = 0
DOCUMENT = 1024  # mean tokens


def sweep() -> dict[str, Experiment]:
  return {str(n): experiment(n, 8192) for n in (1, 2, 4, 8)}


def experiment(context: int, sequence_length: int) -> Experiment:
  return Experiment(
    ModelConfig(
      family='ternary',
      vocab_size=4096,
      layers=2,
      d_model=64,
      d_ff=192,
      heads=4,
      kv_heads=2,
      head_dim=16,
      context_length=sequence_length,
      qk_norm=True,
      document_separator=SEPARATOR,
    ),
    DataConfig('data/long', batch_size=1, sequence_length=sequence_length),
    OptimizerConfig(TriLMSchedule(2.4e-3, 1.5e-3, warmup_steps=10)),
    RunConfig(f'runs/context/{context}', steps=100),
    MeshConfig(fsdp=1, context=context),
  )


def compiled(settings: Experiment, mesh: jax.sharding.Mesh):
  """Loss and gradient of a batch, as a program."""
  state = step.abstract_state(settings, mesh)
  placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
  shape = (settings.data.batch_size, settings.data.sequence_length + 1)
  tokens = jax.ShapeDtypeStruct(
    shape, jnp.int32, sharding=step.batch_sharding(mesh)
  )
  # The step's own function of loss and gradient, without the update.
  run = lambda params, tokens: step._accumulated(settings, params, tokens)
  return (
    jax.jit(run, out_shardings=(None, placed))
    .lower(state.params, tokens)
    .compile()
  )


def computed(settings: Experiment, mesh: jax.sharding.Mesh, program):
  """Loss and gradient of a batch of random documents."""
  rng = np.random.default_rng(0)
  shape = (settings.data.batch_size, settings.data.sequence_length + 1)
  tokens = rng.integers(1, settings.model.vocab_size, shape, np.int32)
  tokens = np.where(rng.random(shape) < 1 / DOCUMENT, SEPARATOR, tokens)
  placed = step.shardings(settings, mesh).params
  params = decoder.init(settings.model, jax.random.key(0))
  (_, metrics), gradient = program(
    jax.device_put(params, placed),
    jax.device_put(tokens, step.batch_sharding(mesh)),
  )
  return float(metrics['loss']), [
    np.asarray(g) for g in jax.tree.leaves(gradient)
  ]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--sequence-length', type=int, default=8192)
  parser.add_argument('--devices', type=int, nargs='+', default=[1, 2, 4, 8])
  parser.add_argument(
    '--compile-only', action='store_true', help='memory and bytes alone'
  )
  parser.add_argument(
    '--dtype', choices=['float32', 'bfloat16'], default='float32'
  )
  options = parser.parse_args()
  print(
    json.dumps(
      {
        'command': ' '.join(sys.argv),
        'date': datetime.date.today().isoformat(),
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      }
    )
  )
  first = None
  for n in options.devices:
    settings = experiment(n, options.sequence_length)
    settings = dataclasses.replace(
      settings, model=dataclasses.replace(settings.model, dtype=options.dtype)
    )
    mesh = mesh_lib.make_mesh(settings.mesh, jax.devices()[:n])
    with jax.set_mesh(mesh):
      program = compiled(settings, mesh)
      memory = program.memory_analysis()
      assert memory is not None  # every backend of ours tells
      record = {
        'devices': n,
        'temporary_mb': round(memory.temp_size_in_bytes / 1e6, 1),
        'sent_mb': {
          op: round(size / 1e6, 2)
          for op, size in collectives.bytes_per_device(
            collectives.of(program)
          ).items()
        },
      }
      if not options.compile_only:
        loss, gradient = computed(settings, mesh, program)
        first = first or (loss, gradient)
        record |= {
          'loss': loss,
          'loss_difference': abs(loss / first[0] - 1),
          'gradient_difference': max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(gradient, first[1], strict=True)
          ),
        }
    print(json.dumps(record), flush=True)


if __name__ == '__main__':
  # Before JAX starts; a user's own choice stands.
  os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  main()
