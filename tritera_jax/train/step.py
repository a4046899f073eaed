# SPDX-License-Identifier: Apache-2.0
"""One update: a pure function of (state, batch)."""

from collections.abc import Mapping
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32, PyTree, UInt32
import optax

from tritera_jax.experiment import Experiment
from tritera_jax.model import decoder
from tritera_jax.parallel import digest, rules
from tritera_jax.train import chunked_loss, diloco, loss, optimizer


class TrainState(NamedTuple):
  """Everything that an update reads and writes, beside the batch.

  Invariant: `step` updates have been made, from the first batches that the run
  does not skip, so that `step` is the data position. Nothing is drawn at random
  after initialisation, so that there is no key.

  Attributes:
    step: updates made.
    tokens_digest: of all the tokens trained on, in order: two runs that agree
      in it have lost and repeated the same batches, which is none.
    params: float32 latents.
    opt_state: of optax, or of DiLoCo.
  """

  step: Int32[Array, '']
  tokens_digest: UInt32[Array, '']
  params: PyTree
  opt_state: PyTree


def shardings(experiment: Experiment, mesh: Mesh | AbstractMesh) -> TrainState:
  """The sharding of each leaf of the state; moments lie as parameters do."""
  config = experiment.optimizer
  params = rules.shardings(mesh, decoder.logical_axes(experiment.model))
  whole = rules.shardings(mesh, ())
  shapes = decoder.abstract_params(experiment.model)
  rule = optimizer.make(config, experiment.run.steps)
  # Muon and AdamW each have a MaskedNode where the other has a moment.
  masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
  opt_state = optax.tree.map_params(
    rule,
    lambda leaf, sharding: leaf if masked(leaf) else sharding,
    jax.eval_shape(rule.init, shapes),
    params,
    transform_non_params=lambda _: whole,
    is_leaf=masked,
  )
  if config.diloco is not None:
    opt_state = diloco.shardings(mesh, config.diloco, params, opt_state, shapes)
  return TrainState(whole, whole, params, opt_state)


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
  """`init_state`, made straight into its shards; parameters may be given."""
  return jax.jit(
    functools.partial(init_state, experiment),
    out_shardings=shardings(experiment, mesh),
  )


def jitted(experiment: Experiment, mesh: Mesh, *, votes: bool = False):
  """`train_step` of (state, tokens, n); the state's buffers are reused.

  With `votes` it has a fourth argument, what each device's process wants: the
  largest of each wish is among the metrics, the same for all processes.

  Raises:
    ValueError: the mesh cannot divide the batch.
  """
  check_batch(experiment, mesh.shape)
  placed = shardings(experiment, mesh)

  def update(state, tokens_BT1, n, *votes_PW):
    after, measured = train_step(experiment, state, tokens_BT1, n)
    for wishes_PW in votes_PW:
      measured['votes'] = wishes_PW.max(axis=0)
    return after, measured

  return jax.jit(
    update,
    in_shardings=(
      placed, batch_sharding(mesh), None, *votes * [votes_sharding(mesh)],
    ),
    out_shardings=(placed, None),
    donate_argnums=0,
  )  # fmt: skip


def votes_sharding(mesh: Mesh) -> NamedSharding:
  """Of votes, int32 [devices, wishes]."""
  return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of a batch's tokens, [B, T+1]."""
  return NamedSharding(mesh, rules.spec(('batch', None)))


def check_batch(experiment: Experiment, sizes: Mapping[str, int]):
  """Refuses what a mesh of these axis sizes cannot divide.

  Raises:
    ValueError: it cannot divide the batch, its sequences or the model.
  """
  rows, parts = experiment.data.batch_size, experiment.run.accumulation
  shares = sizes['data'] * sizes['fsdp']
  if rows % (parts * shares):
    raise ValueError(
      f'data.batch_size={rows} must be a multiple of run.accumulation={parts} '
      f'x mesh.data={sizes["data"]} x mesh.fsdp={sizes["fsdp"]}'
    )
  if sizes['context'] > 1:
    _check_context(experiment, sizes)
  if experiment.optimizer.diloco is not None:
    _check_workers(experiment, experiment.optimizer.diloco.workers, sizes)


def _check_context(experiment: Experiment, sizes: Mapping[str, int]):
  context, model = sizes['context'], experiment.model
  if experiment.run.attention != 'xla':
    raise ValueError(
      f'run.attention={experiment.run.attention!r} takes whole sequences, and '
      f"mesh.context={context} splits them; set run.attention to 'xla'"
    )
  T = experiment.data.sequence_length
  if T % (2 * context):
    raise ValueError(
      f'data.sequence_length={T} must be a multiple of 2 x mesh.context='
      f'{context}: each device takes an early and a late part of a sequence'
    )
  for field, value, axes in (
    ('kv_heads', model.kv_heads, ('tensor',)),
    ('d_model', model.d_model, ('fsdp', 'context')),
  ):
    if value % math.prod(sizes[axis] for axis in axes):
      raise ValueError(
        f'model.{field}={value} must be a multiple of '
        + ' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in axes)
        + f', with mesh.context={context}'
      )


def _check_workers(
  experiment: Experiment, workers: int, sizes: Mapping[str, int]
):
  rows, parts = experiment.data.batch_size, experiment.run.accumulation
  if workers % sizes['data']:
    raise ValueError(
      f'optimizer.diloco.workers={workers} must be a multiple of mesh.data='
      f'{sizes["data"]}, along which they lie'
    )
  if rows % (parts * workers * sizes['fsdp']):
    raise ValueError(
      f'data.batch_size={rows} must be a multiple of run.accumulation={parts} '
      f'x optimizer.diloco.workers={workers} x mesh.fsdp={sizes["fsdp"]}'
    )


def init_state(
  experiment: Experiment, given: PyTree | None = None
) -> TrainState:
  """The state before the first update.

  Args:
    experiment: whose it is.
    given: parameters; default: a pure function of run.seed.
  """
  params: PyTree = given
  if given is None:
    params = decoder.init(experiment.model, jax.random.key(experiment.run.seed))
  config = experiment.optimizer
  rule = optimizer.make(config, experiment.run.steps)
  if config.diloco is None:
    opt_state = rule.init(params)
  else:
    opt_state = diloco.init(config.diloco, params, rule)
  return TrainState(jnp.int32(0), jnp.uint32(0), params, opt_state)


def train_step(
  experiment: Experiment,
  state: TrainState,
  tokens_BT1: Int32[Array, 'B T1'],
  n: Int32[Array, ''] | int,
) -> tuple[TrainState, dict[str, Float32[Array, '']]]:
  """The state after update n, of T+1 tokens a row, and what was measured.

  The state stays as it is if loss or gradient is not finite, and if update n
  is not its next one: so after a failed update it waits, whatever comes.

  Metrics: loss (nats a token, before the update), gradient_norm (before
  clipping), parameter_norm, learning_rate, z_loss if it has a weight, and
  updated (1 or 0).
  """
  run, config = experiment.run, experiment.optimizer
  update = functools.partial(_update, experiment)
  if config.diloco is None:
    params, opt_state, measured = update(
      state.params, state.opt_state, tokens_BT1
    )
  else:
    params, opt_state, measured = diloco.step(
      config.diloco,
      state.params,
      state.opt_state,
      tokens_BT1,
      (state.step + 1) % config.diloco.every == 0,
      update,
    )
  updated = (
    jnp.isfinite(measured['loss'])
    & jnp.isfinite(measured['gradient_norm'])
    & (state.step == n)
  )
  after = TrainState(
    state.step + 1,
    digest.chained(state.tokens_digest, digest.digest(tokens_BT1)),
    params,
    opt_state,
  )
  after = jax.tree.map(
    lambda new, old: jnp.where(updated, new, old), after, state
  )
  rate = config.schedule.learning_rate(state.step, run.steps)
  return after, measured | {
    'parameter_norm': optax.tree.norm(state.params),
    'learning_rate': rate,
    'updated': updated.astype(jnp.float32),
  }


def _update(experiment: Experiment, params: PyTree, opt_state, tokens_BT1):
  """Parameters and optimizer state after a batch, and what was measured."""
  (_, measured), grads = _accumulated(experiment, params, tokens_BT1)
  measured['gradient_norm'] = optax.tree.norm(grads)
  rule = optimizer.make(
    experiment.optimizer,
    experiment.run.steps,
    decoder.logical_axes(experiment.model),
  )
  updates, opt_state = rule.update(grads, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, measured


def _accumulated(experiment: Experiment, params: PyTree, tokens_BT1):
  """Mean loss, metrics and gradient of the batch, part by part."""
  grad = jax.value_and_grad(
    functools.partial(_mean_loss, experiment), has_aux=True
  )
  parts = experiment.run.accumulation
  if parts == 1:
    return grad(params, tokens_BT1)
  # Part a takes rows a, a + parts, ...: each device has some of every part.
  B, T1 = tokens_BT1.shape
  parts_AbT1 = tokens_BT1.reshape(B // parts, parts, T1).swapaxes(0, 1)
  parts_AbT1 = rules.constrain(parts_AbT1, (None, 'batch', None))

  def add(sums, tokens_bT1):
    return jax.tree.map(jnp.add, sums, grad(params, tokens_bT1)), None

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    jax.eval_shape(grad, params, parts_AbT1[0]),
  )
  sums, _ = jax.lax.scan(add, zeros, parts_AbT1)
  return jax.tree.map(lambda leaf: leaf / parts, sums)


def _mean_loss(experiment: Experiment, params: PyTree, tokens_BT1):
  """What is minimised, and the metrics that go with it."""
  run, weight = experiment.run, experiment.optimizer.z_loss
  model = decoder.bind(experiment.model, params)
  x_BTD, _ = model.hidden(
    tokens_BT1[:, :-1],
    remat=run.remat,
    gather=run.gather,
    attention=run.attention,
  )
  targets_BT = tokens_BT1[:, 1:]
  if run.loss_chunk:
    minimised, nats_BT, squared_BT = chunked_loss.cross_entropy(
      model.norm(x_BTD),
      model.head.kernel[...],
      targets_BT,
      jnp.full(targets_BT.shape, 1 / targets_BT.size, jnp.float32),
      chunk=run.loss_chunk,
      z_loss=weight,
    )
    measured = {'loss': nats_BT.mean()}
    if weight:
      measured['z_loss'] = weight * squared_BT.mean()
    return minimised, measured
  logits_BTV = model.logits(x_BTD)
  nats = loss.token_losses(logits_BTV, targets_BT).mean()
  if not weight:
    return nats, {'loss': nats}
  z_loss = weight * loss.squared_log_z(logits_BTV).mean()
  return nats + z_loss, {'loss': nats, 'z_loss': z_loss}
