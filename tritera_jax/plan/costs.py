# SPDX-License-Identifier: Apache-2.0
"""What one step costs one device, without a compiler: an estimate.

Matmuls and what the backward pass keeps are read off the traced program of
one device's share (`traced`), so that another attention, policy or loss is
counted as it is. What devices send each other is counted by hand (`network`).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.plan import network, traced
from tritera_jax.plan.network import Collective
from tritera_jax.plan.targets import Target
from tritera_jax.train import step

# Shares of a data sheet's rates that a step is taken to reach. Matmuls: the
# 55 to 60 % of MFU that MaxText's README reports, over what remat adds.
# The other two are assumptions; `check` says how wrong all are here.
MATMUL_EFFICIENCY = 0.7
MEMORY_EFFICIENCY = 0.8
NETWORK_EFFICIENCY = 0.7
# Of a device's memory, what a program may have: XLA and its runtime take some.
# (On GPUs JAX takes 3/4 unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.)
USABLE_MEMORY = 0.92
_FLOAT = 4  # bytes: latents, moments, gradients and sums are float32


@dataclasses.dataclass(frozen=True)
class Costs:
  """Estimates for one step.

  Attributes:
    memory: bytes of a device by what they are; the first is the state, the
      step's arguments, and exact.
    capacity: bytes that a program may have.
    model_flops: of all devices, without what is computed twice.
    flops: of one device, of all its matmuls.
    traffic: bytes that one device's matmuls and optimizer read and write.
    collectives: what the mesh costs.
    compute, reading, network: seconds of each alone, at the stated shares of
      the data sheet's rates.
  """

  memory: dict[str, float]
  capacity: float
  model_flops: float
  flops: float
  traffic: float
  collectives: tuple[Collective, ...]
  compute: float
  reading: float
  network: float

  @property
  def peak_memory(self) -> float:
    """Bytes a device needs; loss and blocks do not work at the same time."""
    return sum(self.memory.values()) - min(
      self.memory['block at work'], self.memory['head and loss']
    )

  @property
  def fits(self) -> bool:
    return self.peak_memory <= self.capacity

  @property
  def least(self) -> float:
    """Seconds of a step if all three overlap."""
    return max(self.compute, self.reading, self.network)

  @property
  def most(self) -> float:
    """Seconds of a step if nothing does."""
    return self.compute + self.reading + self.network

  @property
  def seconds(self) -> float:
    """The estimate: half way between `least` and `most`."""
    return (self.least + self.most) / 2

  @property
  def bound(self) -> str:
    """The term that is largest."""
    terms = ('compute', 'reading', 'network')
    return max(terms, key=lambda term: getattr(self, term))


def mfu(experiment: Experiment, target: Target, seconds: float) -> float:
  """By the formula of `train.throughput`, for steps of so many seconds."""
  return model_flops(experiment) / (target.devices * target.chip.peak * seconds)


def model_flops(experiment: Experiment) -> float:
  """Of a step over all devices."""
  per_token = flops.training_flops_per_token(
    experiment.model, experiment.data.sequence_length
  )
  return float(experiment.batch_tokens * per_token)


def check_mesh(experiment: Experiment, devices: int) -> dict[str, int]:
  """The mesh's sizes over so many devices.

  Raises:
    ValueError: the mesh does not fit the devices, the model or the batch.
  """
  sizes = mesh_lib.axis_sizes(experiment.mesh, devices)
  step.check_batch(experiment, sizes)
  model = experiment.model
  for axes, fields in (
    (('tensor',), ('heads', 'kv_heads', 'd_ff', 'padded_vocab_size')),
    (network.WEIGHTS, ('d_model',)),
  ):
    for field in fields:
      if getattr(model, field) % network.size(sizes, axes):
        said = ' x '.join(f'mesh.{a}={sizes[a]}' for a in axes if a in sizes)
        raise ValueError(
          f'{said} does not divide model.{field}={getattr(model, field)}; '
          'choose a divisor'
        )
  if experiment.data.sequence_length % sizes['context']:
    raise ValueError(
      f'mesh.context={sizes["context"]} does not divide '
      f'data.sequence_length={experiment.data.sequence_length}; choose a '
      'divisor'
    )
  return sizes


def of(experiment: Experiment, target: Target) -> Costs:
  """The costs of a step of the experiment, by its mesh, on the target.

  Raises:
    ValueError: see `check_mesh`.
  """
  sizes = check_mesh(experiment, target.devices)
  model, run, chip = experiment.model, experiment.run, target.chip
  parts = run.accumulation
  rows = experiment.data.batch_size // (parts * sizes['data'] * sizes['fsdp'])
  share = traced.share(experiment, sizes)
  width = jnp.dtype(model.dtype).itemsize

  counted = [traced.counts(traced.varied(share, rows=n)) for n in (1, 2)]
  per_row = [b - a for a, b in zip(*counted, strict=True)]
  work, moved = (
    parts * (first + (rows - 1) * more)
    for first, more in zip(counted[0], per_row, strict=True)
  )
  holders = network.size(sizes, network.WEIGHTS)
  work += parts * rows * traced.ring_flops(share, sizes)
  work += traced.muon_flops(experiment) / (holders * sizes['tensor'])
  state, parameters = state_bytes(stateless(experiment), tuple(sizes.items()))
  # Read gradients, state and parameters; write the latter two.
  moved += 2 * state + parameters

  kept, weights = traced.residuals(share)
  block, _ = traced.residuals(traced.varied(share, remat='none', layers=1))
  layer = flops.linear_parameters(model) / model.layers / sizes['tensor']
  gathered = network.gathered_width(experiment, target)
  head = model.d_model * model.padded_vocab_size / sizes['tensor']
  chunk = min(run.loss_chunk or math.inf, rows * share.data.sequence_length)
  memory = {
    'state': state,
    'gradients': (1 + (parts > 1)) * parameters,
    'kept for backward': rows * kept + weights / holders,
    # This layer's weights and the next one's, gathered and as floats.
    'gathered weights': 2 * layer * (gathered + width),
    'block at work': 0.0 if run.remat == 'none' else rows * block,
    'head and loss': head * (width + _FLOAT)
    + 2 * _FLOAT * chunk * share.model.padded_vocab_size,
    'embedding gradient': _FLOAT * head,
  }
  collectives = tuple(network.collectives(experiment, target, sizes, rows))
  return Costs(
    memory,
    USABLE_MEMORY * chip.memory,
    model_flops(experiment),
    work,
    moved,
    collectives,
    work / (MATMUL_EFFICIENCY * chip.peak),
    moved / (MEMORY_EFFICIENCY * chip.bandwidth),
    sum(c.seconds for c in collectives) / NETWORK_EFFICIENCY,
  )


@functools.lru_cache(maxsize=1024)
def state_bytes(
  experiment: Experiment, sizes: tuple[tuple[str, int], ...]
) -> tuple[float, float]:
  """Bytes of a device: of the whole state, and of the parameters in it."""
  axes, lengths = zip(*sizes, strict=True)
  mesh = AbstractMesh(lengths, axes, (AxisType.Auto,) * len(axes))
  state = jax.eval_shape(lambda: step.init_state(experiment))
  placed = step.shardings(experiment, mesh)

  def count(leaves, shardings) -> float:
    pairs = zip(
      jax.tree.leaves(leaves), jax.tree.leaves(shardings), strict=True
    )
    return float(
      sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in pairs
      )
    )

  return count(state, placed), count(state.params, placed.params)


def stateless(experiment: Experiment) -> Experiment:
  """One experiment for all that have the same state."""
  run = dataclasses.replace(traced.alone(experiment.run), remat='none')
  return dataclasses.replace(experiment, mesh=MeshConfig(), run=run)
