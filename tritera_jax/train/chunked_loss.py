# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy whose logits exist for a chunk of tokens at a time.

The logits of a step, float32 [B, T, V], are its largest array by far. What
training wants of them is a number a token and two gradients, which are as
small as what they are the gradients of. Both are made chunk by chunk in the
forward pass, so that nothing is computed twice: the objective is one number,
and its cotangent multiplies them in the backward pass.

With Z the sum of the exponentials of a token's logits l, y its target, w its
weight and c the factor of the z-loss (PaLM, section 5), the objective is the
sum over tokens of w (log Z - l_y + c (log Z)^2), and its derivative by l_v is
w ((1 + 2 c log Z) exp(l_v) / Z - [v = y]).

On a mesh each device goes through its own tokens and its own columns of the
head. The head is gathered over the axis that splits its rows once, and its
gradient summed once, whatever the number of chunks; a chunk's sums over the
vocabulary are three numbers a token.

Shapes: B rows, T tokens of a row, D width, V columns of the head; N tokens of
this device, C of a chunk, K chunks. Inside `_local`, B, V and the first axis
of the head are this device's share.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from tritera_jax.parallel import rules


class Objective(NamedTuple):
  """What is minimised, and what it is made of.

  Attributes:
    total: the weighted sum; the only one that has a gradient.
    nats_BT: loss of each target; 0 where the weight is 0.
    squared_log_z_BT: (log Z)^2; 0 where the weight is 0.
  """

  total: Float32[Array, '']
  nats_BT: Float32[Array, 'B T']
  squared_log_z_BT: Float32[Array, 'B T']


class _Settings(NamedTuple):
  """What is known when the program is compiled."""

  z_loss: float
  chunk: int
  vocab_size: int | None


def cross_entropy(
  x_BTD: Float[Array, 'B T D'],
  w_DV: Float32[Array, 'D V'],
  targets_BT: Int32[Array, 'B T'],
  weights_BT: Float32[Array, 'B T'],
  *,
  chunk: int,
  z_loss: float = 0.0,
  vocab_size: int | None = None,
) -> Objective:
  """Weighted cross-entropy of the logits x w, with gradients to x and w.

  The matrix is multiplied in x's dtype; logits, sums over tokens and the
  matrix's gradient are float32 whatever it is. Weights have no gradient.

  Args:
    x_BTD: normalised hidden states.
    w_DV: the head.
    targets_BT: columns of the head; any number where the weight is 0.
    weights_BT: 0 ignores a token, even if its x is not finite.
    chunk: most tokens of a device whose logits exist at once.
    z_loss: factor of (log Z)^2.
    vocab_size: columns from it on are never predicted. None: all of them may
      be, as in `loss.token_losses`.

  Raises:
    ValueError: chunk < 1.
  """
  if chunk < 1:
    raise ValueError(f'chunk={chunk} must be >= 1')
  settings = _Settings(z_loss, chunk, vocab_size)
  weights_BT = jax.lax.stop_gradient(weights_BT)
  found: tuple[Array, Array, Array] = _objective(
    settings, x_BTD, w_DV, targets_BT, weights_BT
  )
  total, *losses_BT = found
  nats_BT, squared_BT = jax.lax.stop_gradient(losses_BT)
  return Objective(total, nats_BT, squared_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(settings, x_BTD, w_DV, targets_BT, weights_BT):
  return _computed(settings, False, x_BTD, w_DV, targets_BT, weights_BT)[0]


def _forward(settings, x_BTD, w_DV, targets_BT, weights_BT):
  return _computed(settings, True, x_BTD, w_DV, targets_BT, weights_BT)


def _backward(settings, gradients, cotangents):
  del settings
  dx_BTD, dw_DV = gradients
  scale = cotangents[0]  # those of the other outputs are stopped
  return (scale * dx_BTD).astype(dx_BTD.dtype), scale * dw_DV, None, None


_objective.defvjp(_forward, _backward)


class _Axes(NamedTuple):
  """The mesh axes that split the rows of a batch, and the head's two."""

  batch: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()


def _computed(settings, with_gradients, *arrays):
  """((total, nats, squared log Z), (gradient of x, of w) or None)."""
  local = functools.partial(_local, settings, with_gradients)
  if jax.sharding.get_abstract_mesh().empty:
    nats_BT, squared_BT, gradients = local(_Axes(), *arrays)
  else:
    hidden = rules.spec(('batch', None, None))
    head = rules.spec(('embed', 'vocab'))
    tokens = rules.spec(('batch', None))
    entries = hidden[0], head[0], head[1]
    axes = _Axes(*((e,) if isinstance(e, str) else e or () for e in entries))
    nats_BT, squared_BT, gradients = jax.shard_map(
      functools.partial(local, axes),
      in_specs=(hidden, head, tokens, tokens),
      out_specs=(tokens, tokens, (hidden, head) if with_gradients else None),
      check_vma=False,  # nothing is differentiated through it
    )(*arrays)
  losses_BT = nats_BT + settings.z_loss * squared_BT
  total = jnp.sum(losses_BT * arrays[-1])
  return (total, nats_BT, squared_BT), gradients


def _local(settings, with_gradients, axes, x_BTD, w_DV, targets_BT, weights_BT):
  """Losses of this device's tokens, and its share of both gradients."""
  N = targets_BT.size
  K = -(-N // settings.chunk)
  C = -(-N // K)  # as even as they can be
  w_DV = w_DV.astype(x_BTD.dtype)
  if axes.embed:
    w_DV = jax.lax.all_gather(w_DV, axes.embed, tiled=True)
  D, V = w_DV.shape
  columns_V = jnp.arange(V)
  if axes.vocab:
    columns_V += V * jax.lax.axis_index(axes.vocab)

  def chunk(dw_DV, part):
    x_CD, targets_C, weights_C = part
    used_C = weights_C != 0
    x_CD = jnp.where(used_C[:, None], x_CD, 0)
    logits_CV = _dot(x_CD, w_DV, 1, 0)
    if settings.vocab_size is not None:
      logits_CV = jnp.where(
        columns_V < settings.vocab_size, logits_CV, -jnp.inf
      )
    top_C = jnp.max(logits_CV, axis=1)
    if axes.vocab:
      top_C = jax.lax.pmax(top_C, axes.vocab)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    is_target_CV = columns_V == targets_C[:, None]
    sum_C, target_C = _sum(
      (
        jnp.sum(exp_CV, axis=1),
        jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=1),
      ),
      axes.vocab,
    )
    log_z_C = jnp.log(sum_C) + top_C
    losses = tuple(
      jnp.where(used_C, value_C, 0)
      for value_C in (log_z_C - target_C, jnp.square(log_z_C))
    )
    if not with_gradients:
      return dw_DV, (*losses, None)
    factor_C = weights_C * (1 + 2 * settings.z_loss * log_z_C) / sum_C
    g_CV = factor_C[:, None] * exp_CV
    g_CV -= jnp.where(is_target_CV, weights_C[:, None], 0)
    g_CV = g_CV.astype(x_CD.dtype)
    dx_CD = _sum(_dot(g_CV, w_DV, 1, 1), axes.vocab).astype(x_CD.dtype)
    return dw_DV + _dot(x_CD, g_CV, 0, 0), (*losses, dx_CD)

  def parts(array, *width):
    array = array.reshape(N, *width)
    array = jnp.pad(array, ((0, K * C - N), *((0, 0) for _ in width)))
    return array.reshape(K, C, *width)

  dw_DV = jnp.zeros((D, V), jnp.float32) if with_gradients else None
  dw_DV, (nats_KC, squared_KC, dx_KCD) = jax.lax.scan(
    chunk, dw_DV, (parts(x_BTD, D), parts(targets_BT), parts(weights_BT))
  )
  losses_BT = tuple(
    values_KC.reshape(-1)[:N].reshape(targets_BT.shape)
    for values_KC in (nats_KC, squared_KC)
  )
  if not with_gradients:
    return *losses_BT, None
  if axes.embed:
    dw_DV = jax.lax.psum_scatter(dw_DV, axes.embed, tiled=True)
  rest = tuple(axis for axis in axes.batch if axis not in axes.embed)
  dx_BTD = dx_KCD.reshape(-1, D)[:N].reshape(x_BTD.shape)
  return *losses_BT, (dx_BTD, _sum(dw_DV, rest))


def _sum(values, axes):
  return jax.lax.psum(values, axes) if axes else values


def _dot(a, b, contract_a: int, contract_b: int) -> jax.Array:
  return jax.lax.dot_general(
    a,
    b,
    (((contract_a,), (contract_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
