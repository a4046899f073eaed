# SPDX-License-Identifier: Apache-2.0
"""AdamW, or Muon and AdamW, with clipping, under a schedule of both rates."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import optax

from tritera_jax.experiment import OptimizerConfig
from tritera_jax.train import muon


def decayed(params: PyTree) -> PyTree[bool]:
  """True for matrices; norm gains are not decayed."""

  def is_matrix(path, leaf):
    del leaf
    return path[-1].key in ('kernel', 'embedding')

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def make(
  config: OptimizerConfig,
  steps: int,
  axes: PyTree[tuple[str | None, ...]] | None = None,
) -> optax.GradientTransformation:
  """The update rule of a run of `steps` steps.

  Args:
    config: its settings.
    steps: of the run.
    axes: logical axes of each parameter, by which Muon moves matrices over a
      mesh; None: XLA moves parts of them.
  """
  schedule = config.schedule

  def rate(step):
    return schedule.learning_rate(jnp.asarray(step), steps)

  def decay(step):
    return schedule.decay(jnp.asarray(step), steps)

  update = optax.adamw(
    rate,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=decay,
    mask=decayed,
  )
  if config.muon is not None:
    update = muon.beside(update, config.muon, rate, decay, axes)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
