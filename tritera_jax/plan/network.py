# SPDX-License-Identifier: Apache-2.0
"""What the axes of a mesh exchange in a training step, counted by hand."""

from collections.abc import Iterator
import math
from typing import NamedTuple

import jax.numpy as jnp

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.plan.targets import Target

# Mesh axes that split parameters, and gather them for their work.
WEIGHTS = ('fsdp', 'context')
_FLOAT = 4  # bytes: gradients and sums are float32


class Collective(NamedTuple):
  """Of a step: what for, over which axis, and what it costs a device.

  Attributes:
    name: of what is sent.
    axis: of the mesh.
    bytes: received by a device.
    seconds: at the networks' data sheet rates.
  """

  name: str
  axis: str
  bytes: float
  seconds: float


def size(sizes: dict[str, int], axes: tuple[str, ...]) -> int:
  """Devices along these axes."""
  return math.prod(sizes[axis] for axis in axes)


def gathered_width(experiment: Experiment, target: Target) -> float:
  """Bytes of a linear weight as fsdp gathers it.

  Of quantised layers XLA was seen to gather int8 codes for TPUs, and codes in
  the compute dtype for CPUs; of GPUs it is taken to do as for TPUs.
  """
  gather = experiment.run.gather
  if gather == 'two_bit':
    return 0.25
  if gather == 'bfloat16':
    return 2.0
  if experiment.model.family == 'float' or target.chip.kind == 'cpu':
    return float(jnp.dtype(experiment.model.dtype).itemsize)
  return 1.0


def collectives(
  experiment: Experiment, target: Target, sizes: dict[str, int], rows: int
) -> Iterator[Collective]:
  """What the axes exchange in a step.

  fsdp gathers weights for forward and backward pass of every part of the
  batch, and sums gradients into shards. data sums gradients. tensor sums the
  residual stream twice a block each way. context passes keys and values on.
  Muon's own are not counted, nor is the time that a message takes to start.
  """
  model, run = experiment.model, experiment.run
  width = jnp.dtype(model.dtype).itemsize
  parts, inside = run.accumulation, _inside(target, sizes)
  linear = flops.linear_parameters(model) / sizes['tensor']
  # Embedding and head: each gathered, and its gradient summed, a part.
  ends = flops.embedding_parameters(model) / sizes['tensor']
  both = linear + ends

  def moved(name, axes, nbytes, ways=1):
    n, m = size(sizes, axes), size(inside, axes)
    nbytes *= ways
    seconds = max(
      nbytes * (n - 1) / n / target.chip.fast,
      nbytes * (n - m) / n / (m * target.chip.slow),
    )
    across = ' x '.join(axis for axis in axes if sizes[axis] > 1)
    return Collective(name, across, nbytes * (n - 1) / n, seconds)

  if size(sizes, WEIGHTS) > 1:
    yield moved(
      'weights',
      WEIGHTS,
      parts * 2 * linear * gathered_width(experiment, target),
    )
    yield moved('embedding and head', WEIGHTS, parts * ends * width)
    yield moved('gradients', WEIGHTS, parts * both * _FLOAT)
  if sizes['data'] > 1:
    local = both / size(sizes, WEIGHTS)
    yield moved('gradients', ('data',), parts * local * _FLOAT, ways=2)
  tokens = rows * experiment.data.sequence_length / sizes['context']
  again = {'none': 0, 'dots': 0, 'block': 1}[run.remat]
  if sizes['tensor'] > 1:
    sums = model.layers * (4 + again) * width
    ends_sums = width + _FLOAT  # the embedding's rows; the loss's gradient
    nbytes = parts * tokens * model.d_model * (sums + ends_sums)
    yield moved('activations', ('tensor',), nbytes, ways=2)
  if sizes['context'] > 1:
    # Keys and values go round the ring, and back with their gradients.
    kv = 2 * model.kv_heads * model.head_dim / sizes['tensor']
    turns = (1 + (run.remat != 'none') + 1) * width + _FLOAT
    nbytes = parts * model.layers * tokens * sizes['context'] * kv * turns
    yield moved('keys and values', ('context',), nbytes)


def _inside(target: Target, sizes: dict[str, int]) -> dict[str, int]:
  """Of each axis, how many neighbours the fast network joins.

  The last axis is laid out first, and takes as much of it as it can.
  """
  left, inside = target.domain, {}
  for axis in reversed(mesh_lib.AXES):
    inside[axis] = math.gcd(sizes[axis], left)
    left //= inside[axis]
  return inside
