# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of the blocks, beside another rule for the rest.

Equations 1 to 4 of arXiv 2502.16982, for each W [K, N] with gradient G:

  M <- beta M + G
  O  = Newton-Schulz(beta M + G)
  W <- W - rate (rms sqrt(max(K, N)) O + decay W)

Newton-Schulz divides by the Frobenius norm and takes each singular value s
to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, five times: to somewhere near 1. The
momentum is optax.trace and lies on a mesh as its parameter does; the iteration
is optax's too.

Of a matrix that is split over a mesh each of the 15 products gathers or sums
parts. So the stack of layers is split in place of the matrices: two exchanges,
there and back, and the iteration is each device's own. Where most devices
would have no layer, because they are more than twice as many, matrices stay as
they are.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import optax

from tritera_jax.experiment import MuonConfig
from tritera_jax.parallel import rules


def labels(params: PyTree) -> PyTree[str]:
  """'muon' for the kernels of the blocks, [L, K, N]; 'other' for all else.

  By name, for shapes mislead: embedding, head and the stacked gains [L, D]
  are matrices, and the stacked kernels are not.
  """

  def label(path, leaf):
    del leaf
    in_block = path[0].key == 'layers' and path[-1].key == 'kernel'
    return 'muon' if in_block else 'other'

  return jax.tree_util.tree_map_with_path(label, params)


def beside(
  other: optax.GradientTransformation,
  config: MuonConfig,
  rate: optax.Schedule,
  decay: optax.Schedule,
  axes: PyTree[tuple[str | None, ...]] | None = None,
) -> optax.GradientTransformation:
  """Muon for what `labels` says, `other` for the rest.

  Args:
    other: the whole update rule of the rest.
    config: Muon's settings.
    rate: learning rate of a step; `config.rate` multiplies it.
    decay: weight decay of a step, of all of Muon's matrices.
    axes: see `optimizer.make`.
  """
  # Not optax.contrib.muon: its AdamW decays gains too, and is NAdam's; its
  # Nesterov sum is corrected for the zero start, unlike the paper's.
  matrices = optax.chain(
    optax.trace(config.beta, nesterov=True),
    _orthogonalized(config.iterations, axes),
    optax.stateless_with_tree_map(
      lambda update, _: _factor(jnp.shape(update), config.rms) * update
    ),
    optax.add_decayed_weights(decay),
    optax.scale_by_learning_rate(lambda step: config.rate * rate(step)),
  )
  return optax.partition({'muon': matrices, 'other': other}, labels)


def _orthogonalized(
  iterations: int, axes_of_all: PyTree | None
) -> optax.GradientTransformation:
  """Newton-Schulz of each layer's matrix; there is no state."""
  is_axes = lambda node: isinstance(node, tuple)
  axes_at = dict(
    jax.tree_util.tree_leaves_with_path(axes_of_all, is_leaf=is_axes)
  )
  # Inputs and outputs are the last two axes; layers are taken one by one.
  axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
  without_momentum = optax.contrib.scale_by_muon(
    ns_steps=iterations,
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: axes, tree),
  )

  def alone(update_LKN):
    state = without_momentum.init(update_LKN)
    return without_momentum.update(update_LKN, state)[0]

  def orthogonalized(updates, params):
    del params
    return jax.tree_util.tree_map_with_path(
      lambda path, update_LKN: _as_whole_matrices(
        alone, update_LKN, axes_at.get(path, ())
      ),
      updates,
    )

  return optax.stateless(orthogonalized)


def _as_whole_matrices(
  function: Callable[[jax.Array], Any],
  update_LKN: jax.Array,
  axes: tuple[str | None, ...],
) -> jax.Array:
  """A function of a stack of matrices, on devices that have whole ones."""
  L, devices = len(update_LKN), rules.divisor(*axes)
  if devices == 1 or devices > 2 * L:
    return function(update_LKN)

  def local(part_Lkn):
    split = [(n, rules.splits(axis)) for n, axis in enumerate(axes)]
    split = [(n, names) for n, names in split if names]
    # Empty matrices make the stack a multiple of the devices.
    part = jnp.pad(part_Lkn, ((0, -L % devices), (0, 0), (0, 0)))
    for n, names in split:
      part = jax.lax.all_to_all(part, names, 0, n, tiled=True)
    part = function(part)
    for n, names in reversed(split):
      part = jax.lax.all_to_all(part, names, n, 0, tiled=True)
    return part[:L]

  spec = rules.spec(axes)
  return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(
    update_LKN
  )


def _factor(shape: tuple[int, ...], rms: float | None) -> float:
  """What an orthogonal matrix is multiplied by, see `MuonConfig.rms`."""
  K, N = shape[-2:]
  if rms is None:
    return math.sqrt(max(1, N / K))
  # Of an orthogonal [K, N] the root mean square is 1 / sqrt(max(K, N)).
  return rms * math.sqrt(max(K, N))
