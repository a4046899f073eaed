# SPDX-License-Identifier: Apache-2.0
"""Compiles the real training step for devices that are not here.

libtpu compiles for any TPU topology on any Linux machine (`pip install
--no-deps libtpu`). What it says of memory is exact, up to the runtime's own
needs; it runs nothing.
"""

import dataclasses
import importlib.util
import os
import time

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from tritera_jax.experiment import Experiment
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.plan import targets
from tritera_jax.plan.targets import Target
from tritera_jax.train import step

# Read when libtpu is loaded. Ask no cloud which machine this is; look for no
# TPU, and do not warn that there is none; let others compile at the same time,
# for no chip is held.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
# One device for the two cores of a chip, as JAX has it on a real one.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a step, a device.

  Attributes:
    arguments: bytes of state and batch.
    temporaries: bytes beside them at the peak.
    sent: bytes that it sends in a step, by kind of collective.
    seconds: that compiling took.
  """

  arguments: int
  temporaries: int
  sent: dict[str, int]
  seconds: float


_WORDS = 240  # of an error


class Refused(ValueError):
  """The compiler finds no room, or fails; its own words, in short."""


def why_not(target: Target) -> str | None:
  """Why the target's compiler is not to be had here, or None if it is."""
  if not target.chip.topology:
    return f'XLA compiles for {target.chip.kind} only where there is one'
  if targets.topology_name(target) is None:
    return (
      f'{target.devices} {target.chip.topology} are not one slice: 4 to '
      f'{target.chip.domain}, a power of two'
    )
  if importlib.util.find_spec('libtpu') is None:
    return 'no TPU compiler: pip install --no-deps libtpu'
  return None


def devices(target: Target) -> list:
  """Descriptions of the target's devices, to compile for.

  Raises:
    ValueError: there is no compiler for it, or it knows another number.
  """
  reason = why_not(target)
  if reason:
    raise ValueError(f'--target {target.name}: {reason}')
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  name = targets.topology_name(target)
  assert name is not None  # by `why_not`
  try:
    found = topologies.get_topology_desc(
      platform='tpu',
      topology_name=name,
      **_OPTIONS.get(target.chip.topology, {}),
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'--target {target.name}: libtpu does not start ({error}); see whether '
      'another process holds it, or plan with --compiles 0'
    ) from error
  if len(found) != target.devices:
    raise ValueError(
      f'--target {target.name}: libtpu has {len(found)} devices in it; '
      'plan with --compiles 0'
    )
  return list(found)


def compile(experiment: Experiment, target: Target) -> Compiled:
  """Compiles the experiment's step by its own mesh.

  Raises:
    Refused: the program needs more memory than a device has, or the compiler
      fails.
    ValueError: there is no compiler, or the mesh does not fit.
  """
  return compile_on(experiment, devices(target), 'tpu')


def compile_on(experiment: Experiment, devices: list, platform: str):
  """Compiles the step for these devices, described or real."""
  mesh = mesh_lib.make_mesh(experiment.mesh, devices)
  # Both outside the mesh's context: they make small arrays right here.
  state = step.abstract_state(experiment, mesh)
  update = step.jitted(experiment, mesh)
  data = experiment.data
  tokens_BT1 = jax.ShapeDtypeStruct(
    (data.batch_size, data.sequence_length + 1),
    jnp.int32,
    sharding=step.batch_sharding(mesh),
  )
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    traced = update.trace(
      state, tokens_BT1, jax.ShapeDtypeStruct((), jnp.int32)
    )
    try:
      program = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
      first, _, _ = str(error).partition('\n')
      raise Refused(first[:_WORDS]) from error
  seconds = time.perf_counter() - started
  memory = program.memory_analysis()
  assert memory is not None  # every backend of ours knows
  return Compiled(
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes,
    collectives.bytes_per_device(collectives.of(program)),
    seconds,
  )
