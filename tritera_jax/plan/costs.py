# SPDX-License-Identifier: Apache-2.0
"""What one step costs one device, without a compiler: an estimate.

Matmuls and what the backward pass keeps are read off the traced program of
one device's share: the model with its heads, MLP and vocabulary divided by
mesh.tensor, on its rows of the batch. So another attention, policy or loss is
counted as it is. The mesh's own work, which a share does not show, is counted
by hand: see `_collectives`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from tritera_jax.experiment import Experiment, RunConfig
from tritera_jax.model import decoder, flops
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
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
# Mesh axes that split parameters, and gather them for their work.
WEIGHTS = ('fsdp', 'context')
_FLOAT = 4  # bytes: latents, moments, gradients and sums are float32


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
  for axis, fields in (
    ('tensor', ('heads', 'kv_heads', 'd_ff', 'padded_vocab_size')),
    ('fsdp', ('d_model',)),
  ):
    for field in fields:
      if getattr(model, field) % sizes[axis]:
        raise ValueError(
          f'mesh.{axis}={sizes[axis]} does not divide '
          f'model.{field}={getattr(model, field)}; choose a divisor'
        )
  if experiment.data.sequence_length % sizes.get('context', 1):
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
  share = _share(experiment, sizes)
  width = jnp.dtype(model.dtype).itemsize

  counted = [_counts(_with(share, rows=n)) for n in (1, 2)]
  per_row = [b - a for a, b in zip(*counted, strict=True)]
  work, moved = (
    parts * (first + (rows - 1) * more)
    for first, more in zip(counted[0], per_row, strict=True)
  )
  holders = _size(sizes, WEIGHTS)
  work += parts * rows * _ring_flops(share, sizes)
  work += _muon_flops(experiment) / (holders * sizes['tensor'])
  state, parameters = state_bytes(stateless(experiment), tuple(sizes.items()))
  # Read gradients, state and parameters; write the latter two.
  moved += 2 * state + parameters

  kept, weights = _residuals(share)
  block, _ = _residuals(_with(share, remat='none', layers=1))
  layer = flops.linear_parameters(model) / model.layers / sizes['tensor']
  head = model.d_model * model.padded_vocab_size / sizes['tensor']
  chunk = min(run.loss_chunk or math.inf, rows * share.data.sequence_length)
  memory = {
    'state': state,
    'gradients': (1 + (parts > 1)) * parameters,
    'kept for backward': rows * kept + weights / holders,
    # This layer's weights and the next one's, gathered and as floats.
    'gathered weights': 2 * layer * (_gathered_width(experiment) + width),
    'block at work': 0.0 if run.remat == 'none' else rows * block,
    'head and loss': head * (width + _FLOAT)
    + 2 * _FLOAT * chunk * share.model.padded_vocab_size,
    'embedding gradient': _FLOAT * head,
  }
  collectives = tuple(_collectives(experiment, target, sizes, rows))
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
  run = dataclasses.replace(_alone(experiment.run), remat='none')
  return dataclasses.replace(experiment, mesh=MeshConfig(), run=run)


def _share(experiment: Experiment, sizes: dict[str, int]) -> Experiment:
  """One device's model and one row, as an experiment of its own.

  Scales do not matter here, and their blocks need not fit.
  """
  model, run, parts = experiment.model, experiment.run, sizes['tensor']
  return dataclasses.replace(
    experiment,
    model=dataclasses.replace(
      model,
      vocab_size=model.padded_vocab_size // parts,
      d_ff=model.d_ff // parts,
      heads=model.heads // parts,
      kv_heads=model.kv_heads // parts,
      scale_blocks=1,
      document_separator=None,
    ),
    data=dataclasses.replace(
      experiment.data,
      batch_size=1,
      sequence_length=experiment.data.sequence_length
      // sizes.get('context', 1),
    ),
    # The optimizer has no matmuls but Muon's, which the mesh divides.
    optimizer=dataclasses.replace(experiment.optimizer, muon=None),
    run=_alone(run),
    mesh=MeshConfig(),
  )


def _alone(run: RunConfig) -> RunConfig:
  """Of one device, whose matrices are whole: nothing is gathered."""
  gather = {'gather': 'auto'} if hasattr(run, 'gather') else {}
  return dataclasses.replace(run, accumulation=1, **gather)


def _with(share: Experiment, rows: int = 1, remat=None, layers=None):
  model, run = share.model, share.run
  return dataclasses.replace(
    share,
    model=dataclasses.replace(model, layers=layers or model.layers),
    data=dataclasses.replace(share.data, batch_size=rows),
    run=dataclasses.replace(run, remat=remat or run.remat),
  )


@functools.lru_cache(maxsize=1024)
def _counts(share: Experiment) -> tuple[float, float]:
  """FLOPs of the matmuls of a step, and the bytes that they touch."""
  jaxpr = jax.make_jaxpr(functools.partial(step.train_step, share))(
    jax.eval_shape(lambda: step.init_state(share)), _tokens(share, 1), 0
  )
  return matmuls(jaxpr.jaxpr)


def _tokens(share: Experiment, more: int = 0) -> jax.ShapeDtypeStruct:
  shape = share.data.batch_size, share.data.sequence_length + more
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def matmuls(jaxpr: core.Jaxpr) -> tuple[float, float]:
  """FLOPs, and bytes of operands and results, of all products in a program.

  A loop's body counts as often as it runs, if that is known.
  """
  work = moved = 0.0
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
      depth = math.prod(avals[0].shape[axis] for axis in contracted)
      work += 2 * math.prod(avals[-1].shape) * depth
      moved += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
    times = params['length'] if equation.primitive.name == 'scan' else 1
    for inner in _programs(params):
      more = matmuls(inner)
      work, moved = work + times * more[0], moved + times * more[1]
  return work, moved


def _programs(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The programs inside an equation."""
  found = []
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


@functools.lru_cache(maxsize=1024)
def _residuals(share: Experiment) -> tuple[float, float]:
  """Bytes that the forward pass of the blocks keeps for the backward pass.

  Activations, and what has the shape of weights (codes, casts): a mesh
  divides these by fsdp too. Latents themselves are kept anyway.
  """
  params = decoder.abstract_params(share.model)

  def backward(params, tokens_BT):
    def forward(params):
      model = decoder.bind(share.model, params)
      return model.hidden(tokens_BT, remat=share.run.remat)[0]

    return jax.vjp(forward, params)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, params, _tokens(share)))
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  activations = weights = 0.0
  for leaf in kept:
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    if leaf.shape not in shapes:
      activations += nbytes
    elif leaf.dtype != jnp.float32:
      weights += nbytes
  return activations, weights


def _muon_flops(experiment: Experiment) -> float:
  """Of Newton-Schulz: X X^T, its square and their product with X, a time."""
  muon = experiment.optimizer.muon
  if muon is None:
    return 0.0
  total = 0.0
  for spec in experiment.model.linears.values():
    m, n = sorted((spec.in_features, spec.out_features))
    total += 4 * m * m * n + 2 * m**3
  return muon.iterations * experiment.model.layers * total


def _size(sizes: dict[str, int], axes: tuple[str, ...]) -> int:
  """Devices along these axes; one that a mesh does not have is 1."""
  return math.prod(sizes.get(axis, 1) for axis in axes)


def _ring_flops(share: Experiment, sizes: dict[str, int]) -> float:
  """Of a row's attention to what other devices of its sequence hold.

  The share attends within its own T / c tokens. A ring does half of its
  T / c x T, the causal one, in whole blocks.
  """
  c = sizes.get('context', 1)
  model, T = share.model, share.data.sequence_length
  others = max(0.0, (c / 2 - 1) * T * T)
  products = 2 * model.heads * model.head_dim * others
  passes = 2 * (3 if share.run.remat == 'none' else 4)
  return passes * model.layers * products


def _gathered_width(experiment: Experiment) -> float:
  """Bytes of a linear weight as fsdp gathers it.

  Of quantised layers XLA gathers int8 codes: they are what its compiled
  programs for TPUs were seen to gather, since the cast comes after them.
  """
  gather = getattr(experiment.run, 'gather', 'auto')
  if gather == 'two_bit':
    return 0.25
  if gather == 'bfloat16':
    return 2.0
  if experiment.model.family == 'float':
    return float(jnp.dtype(experiment.model.dtype).itemsize)
  return 1.0


def _collectives(
  experiment: Experiment, target: Target, sizes: dict[str, int], rows: int
):
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
    n, m = _size(sizes, axes), _size(inside, axes)
    nbytes *= ways
    seconds = max(
      nbytes * (n - 1) / n / target.chip.fast,
      nbytes * (n - m) / n / (m * target.chip.slow),
    )
    across = ' x '.join(axis for axis in axes if sizes.get(axis, 1) > 1)
    return Collective(name, across, nbytes * (n - 1) / n, seconds)

  if _size(sizes, WEIGHTS) > 1:
    yield moved(
      'weights', WEIGHTS, parts * 2 * linear * _gathered_width(experiment)
    )
    yield moved('embedding and head', WEIGHTS, parts * ends * width)
    yield moved('gradients', WEIGHTS, parts * both * _FLOAT)
  if sizes['data'] > 1:
    local = both / _size(sizes, WEIGHTS)
    yield moved('gradients', ('data',), parts * local * _FLOAT, ways=2)
  tokens = rows * experiment.data.sequence_length / sizes.get('context', 1)
  again = {'none': 0, 'dots': 0, 'block': 1}[run.remat]
  if sizes['tensor'] > 1:
    sums = model.layers * (4 + again) * width
    ends_sums = width + _FLOAT  # the embedding's rows; the loss's gradient
    nbytes = parts * tokens * model.d_model * (sums + ends_sums)
    yield moved('activations', ('tensor',), nbytes, ways=2)
  if sizes.get('context', 1) > 1:
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
