# SPDX-License-Identifier: Apache-2.0
"""DiLoCo: workers that train apart and agree every H steps (arXiv 2311.08105).

With theta what was agreed last, theta_w what worker w made of it in H steps of
its own, and e_w what rounding has kept back from the others so far:

  Delta_w = theta - theta_w + e_w,        e_w <- Delta_w - Q(Delta_w)
  Delta   = the mean of Q(Delta_w) over workers
  u       <- mu u + eta Delta
  theta   <- theta - mu u - eta Delta,    theta_w <- theta

With Muon inside it is MuLoCo (arXiv 2505.23725), which found 4 bits for Q
without loss and 2 bits nearly so, given levels that fit the distribution and
the error fed back. Q here is the quantiser of least squared error for a normal
distribution (Lloyd, Max), scaled to the root mean square of each row.

Workers lie along the mesh axis `data`, W / data of them on each place; each is
an element of a mapped axis, for a manual one stops XLA's partitioner beside
fsdp and tensor (jax 0.11.2). Between agreements nothing crosses `data` but the
metrics' few numbers.
"""

import functools
import math
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree, UInt8
import numpy as np
import optax

from tritera_jax.experiment import DiLoCoConfig
from tritera_jax.parallel import rules
from tritera_jax.train import optimizer

_AXIS = 'data'


class DiLoCoState(NamedTuple):
  """What is beside the agreed parameters. W is a leading axis of every leaf.

  Attributes:
    workers: parameters of each, [W, ...].
    inner: optimizer state of each, [W, ...].
    momentum: u, as the parameters.
    kept_back: e of each, [W, ...]; None where nothing is rounded.
  """

  workers: PyTree
  inner: PyTree
  momentum: PyTree
  kept_back: PyTree


def init(
  config: DiLoCoConfig, params: PyTree, update: optax.GradientTransformation
) -> DiLoCoState:
  """All workers at `params`."""
  W = config.workers
  repeat = lambda leaf: jnp.broadcast_to(leaf, (W, *leaf.shape))
  workers = jax.tree.map(repeat, params)
  return DiLoCoState(
    workers,
    jax.tree.map(repeat, update.init(params)),
    jax.tree.map(jnp.zeros_like, params),
    jax.tree.map(
      lambda rounds, leaf_W: jnp.zeros_like(leaf_W) if rounds else None,
      rounded(config, params),
      workers,
    ),
  )


def rounded(config: DiLoCoConfig, params: PyTree) -> PyTree[bool]:
  """Whose differences are rounded: matrices of rows of whole bytes, if any."""
  return jax.tree.map(
    lambda leaf, is_matrix: (
      is_matrix
      and config.bits < 32
      and leaf.shape[-1] % (8 // config.bits) == 0
    ),
    params,
    optimizer.decayed(params),
  )


def shardings(
  mesh: Mesh | AbstractMesh,
  config: DiLoCoConfig,
  params: PyTree,
  inner: PyTree,
  shapes: PyTree,
) -> DiLoCoState:
  """A sharding for each leaf of the state.

  Args:
    mesh: to lie on.
    config: of DiLoCo.
    params: shardings of the parameters.
    inner: shardings of one worker's optimizer state.
    shapes: of the parameters.
  """
  by_worker = lambda sharding: NamedSharding(
    mesh, PartitionSpec(_AXIS, *sharding.spec)
  )
  workers = jax.tree.map(by_worker, params)
  return DiLoCoState(
    workers,
    jax.tree.map(by_worker, inner),
    params,
    jax.tree.map(
      lambda rounds, sharding: sharding if rounds else None,
      rounded(config, shapes),
      workers,
    ),
  )


def step(
  config: DiLoCoConfig,
  params: PyTree,
  state: DiLoCoState,
  tokens_BT1: Array,
  agree: Array,
  inner_step,
) -> tuple[PyTree, DiLoCoState, dict[str, Array]]:
  """One step of every worker, each on its share of the batch.

  Args:
    config: of DiLoCo.
    params: what was agreed last.
    state: of `init` or of the step before.
    tokens_BT1: the batch; worker w takes the w-th of W runs of rows.
    agree: whether they agree after it.
    inner_step: of (params, optimizer state, tokens) to both anew and metrics.

  Returns:
    What is agreed now, the state, and the metrics' means over workers.
  """
  W = config.workers
  B, T1 = tokens_BT1.shape
  tokens_WbT1 = tokens_BT1.reshape(W, B // W, T1)
  meshless = jax.sharding.get_abstract_mesh().empty
  with rules.without(_AXIS):
    workers, inner, measured = jax.vmap(
      inner_step, spmd_axis_name=None if meshless else _AXIS
    )(state.workers, state.inner, tokens_WbT1)
  state = state._replace(workers=workers, inner=inner)
  params, state = jax.lax.cond(
    agree,
    lambda: _agreed(config, params, state),
    lambda: (params, state),
  )
  return params, state, {k: v.mean() for k, v in measured.items()}


def _agreed(config: DiLoCoConfig, params: PyTree, state: DiLoCoState):
  """What comes of an agreement."""

  def leaf(theta, theta_W, momentum, kept_W):
    delta_W = theta - theta_W
    if kept_W is None:
      mean = delta_W.mean(axis=0)
    else:
      delta_W = delta_W + kept_W
      packed_W = _laid(quantize(delta_W, config.bits), _AXIS)
      kept_W = delta_W - dequantize(packed_W, config.bits)
      # One after another: W matrices of floats would not fit.
      total, _ = jax.lax.scan(
        lambda total, packed: (total + dequantize(packed, config.bits), None),
        jnp.zeros_like(theta),
        _laid(packed_W, None),  # this is what crosses the axis
      )
      mean = total / config.workers
    momentum = config.momentum * momentum + config.rate * mean
    theta = theta - config.momentum * momentum - config.rate * mean
    return theta, jnp.broadcast_to(theta, theta_W.shape), momentum, kept_W

  flat, tree = jax.tree.flatten(params)
  none = lambda x: x is None
  rest = [
    jax.tree.leaves(part, is_leaf=none)
    for part in (state.workers, state.momentum, state.kept_back)
  ]
  theta, workers, momentum, kept = (
    jax.tree.unflatten(tree, leaves)
    for leaves in zip(*map(leaf, flat, *rest), strict=True)
  )
  return theta, DiLoCoState(workers, state.inner, momentum, kept)


def _laid(tree_W: PyTree[Array], axis: str | None) -> PyTree[Array]:
  """Workers' arrays, split over a mesh axis, or whole on each of its places."""
  if jax.sharding.get_abstract_mesh().empty:
    return tree_W

  def laid(x_W):
    rest = [PartitionSpec.UNCONSTRAINED] * (x_W.ndim - 1)
    return jax.lax.with_sharding_constraint(x_W, PartitionSpec(axis, *rest))

  return jax.tree.map(laid, tree_W)


class Packed(NamedTuple):
  """Rows rounded to 2^bits levels.

  Attributes:
    codes: 8 / bits numbers of levels a byte, the first in the lowest bits.
    scale: root mean square of each row.
  """

  codes: UInt8[Array, '*rows n']
  scale: Float[Array, '*rows 1']


def quantize(x: Float[Array, '*rows N'], bits: int) -> Packed:
  """The nearest of the levels that fit a normal distribution, row by row."""
  scale = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
  levels = normal_levels(2**bits)
  edges = (levels[1:] + levels[:-1]) / 2
  relative = x / jnp.where(scale > 0, scale, 1)
  codes = jnp.zeros(x.shape, jnp.uint8)
  for edge in edges:
    codes += (relative > edge).astype(jnp.uint8)
  each = 8 // bits
  codes = codes.reshape(*x.shape[:-1], -1, each)
  shifts = bits * jnp.arange(each, dtype=jnp.uint8)
  return Packed(jnp.sum(codes << shifts, axis=-1, dtype=jnp.uint8), scale)


def dequantize(packed: Packed, bits: int) -> Float[Array, '*rows N']:
  """What the others take a worker's differences for."""
  shifts = bits * jnp.arange(8 // bits, dtype=jnp.uint8)
  codes = (packed.codes[..., None] >> shifts) & jnp.uint8(2**bits - 1)
  codes = codes.reshape(*packed.codes.shape[:-1], -1)
  levels = jnp.asarray(normal_levels(2**bits), packed.scale.dtype)
  return levels[codes] * packed.scale


@functools.cache
def normal_levels(count: int) -> np.ndarray:
  """Levels of least squared error for a standard normal (Max 1960, Lloyd)."""
  normal = statistics.NormalDist()
  levels = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
  for _ in range(2000):
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2), math.inf]
    density = [0.0, *(normal.pdf(edge) for edge in edges[1:-1]), 0.0]
    mass = [0.0, *(normal.cdf(edge) for edge in edges[1:-1]), 1.0]
    # The mean of the normal between two edges.
    levels = -np.diff(density) / np.diff(mass)
  return levels
