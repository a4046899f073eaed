# SPDX-License-Identifier: Apache-2.0
"""One update: a pure function of (state, batch)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float32, Int32, PyTree
import optax

from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.parallel import rules
from tritera_jax.train import loss, optimizer


class TrainState(NamedTuple):
  """Everything an update reads and writes.

  Invariant: `step` updates have been made, from batches 0..step-1, so the
  data position is `step` itself.
  """

  step: Int32[Array, '']
  params: PyTree
  opt_state: PyTree


def shardings(experiment: Experiment, mesh: Mesh) -> TrainState:
  """The sharding of each leaf of the state; moments lie as parameters do."""
  params = rules.shardings(mesh, decoder.logical_axes(experiment.model))
  whole = rules.shardings(mesh, ())
  state = jax.eval_shape(lambda: init_state(experiment))
  opt_state = optax.tree.map_params(
    optimizer.make(experiment.optimizer, experiment.run.steps),
    lambda _, sharding: sharding,
    state.opt_state,
    params,
    transform_non_params=lambda _: whole,
  )
  return TrainState(whole, params, opt_state)


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
  """Shapes, dtypes and shardings of the state."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    jax.eval_shape(lambda: init_state(experiment)),
    shardings(experiment, mesh),
  )


def jitted_init(experiment: Experiment, mesh: Mesh):
  """`init_state`, made straight into its shards."""
  return jax.jit(
    lambda: init_state(experiment), out_shardings=shardings(experiment, mesh)
  )


def jitted(experiment: Experiment, mesh: Mesh):
  """`train_step` of (state, tokens); the state's buffers are reused."""
  placed = shardings(experiment, mesh)
  batch = rules.shardings(mesh, ('batch', None))
  return jax.jit(
    lambda state, tokens_BT1: train_step(experiment, state, tokens_BT1),
    in_shardings=(placed, batch),
    out_shardings=(placed, None),
    donate_argnums=0,
  )


def init_state(experiment: Experiment) -> TrainState:
  """The state before the first update; a pure function of run.seed."""
  params = decoder.init(experiment.model, jax.random.key(experiment.run.seed))
  update = optimizer.make(experiment.optimizer, experiment.run.steps)
  return TrainState(jnp.int32(0), params, update.init(params))


def train_step(
  experiment: Experiment,
  state: TrainState,
  tokens_BT1: Int32[Array, 'B T1'],
) -> tuple[TrainState, dict[str, Float32[Array, '']]]:
  """The state after one more batch of T+1 tokens a row, and its metrics.

  Metrics: loss (nats a token, before the update), gradient_norm (before
  clipping), parameter_norm, learning_rate.
  """
  config, run = experiment.model, experiment.run

  def mean_loss(params):
    logits_BTV, _ = decoder.bind(config, params)(tokens_BT1[:, :-1])
    return loss.token_losses(logits_BTV, tokens_BT1[:, 1:]).mean()

  nats, grads = jax.value_and_grad(mean_loss)(state.params)
  update = optimizer.make(experiment.optimizer, run.steps)
  updates, opt_state = update.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  schedule = experiment.optimizer.schedule
  metrics = {
    'loss': nats,
    'gradient_norm': optax.tree.norm(grads),
    'parameter_norm': optax.tree.norm(state.params),
    'learning_rate': schedule.learning_rate(state.step, run.steps),
  }
  return TrainState(state.step + 1, params, opt_state), metrics
