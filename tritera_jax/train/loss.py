# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy.

Shapes: B rows, T tokens, D width, V padded vocabulary; K chunks of C tokens a
row.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, PyTree
import numpy as np
import optax

from tritera_jax.data.loader import Windows
from tritera_jax.model.interface import LanguageModel

_MOST_LOGITS = 2**26  # of a device at once: 256 MB


def token_losses(
  logits_BTV: Float32[Array, 'B T V'], targets_BT: Int32[Array, 'B T']
) -> Float32[Array, 'B T']:
  """Loss of each target in nats. The padded rows of V count as tokens."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)


def squared_log_z(
  logits_BTV: Float32[Array, 'B T V'],
) -> Float32[Array, 'B T']:
  """log(sum exp logits)^2: what the z-loss keeps small (PaLM, section 5)."""
  return jnp.square(jax.nn.logsumexp(logits_BTV, axis=-1))


def over_logits(
  function: Callable[[Array, Array], PyTree],
  model: LanguageModel,
  x_BTD: Float[Array, 'B T D'],
  targets_BT: Int32[Array, 'B T'],
  *,
  most_logits: int = _MOST_LOGITS,
) -> PyTree[Array, '...']:
  """What `function` makes of all logits, few of which exist at once.

  Args:
    function: of logits [B, C, V] and targets [B, C], whatever C is; returns
      arrays [B, C].
    model: whose logits.
    x_BTD: what its `hidden` returned.
    targets_BT: ids.
    most_logits: of a device, about: a chunk has at least a token a row.

  Returns:
    Its arrays, [B, T].
  """
  B, T = targets_BT.shape
  devices = max(1, jax.sharding.get_abstract_mesh().size)  # 0: no mesh
  K = -(-B * T * model.config.padded_vocab_size // (devices * most_logits))
  if K == 1:
    return function(model.logits(x_BTD), targets_BT)
  C = -(-T // min(K, T))
  K = -(-T // C)

  # Chunk k has the tokens k, k + K, ...: some of every device's, where a mesh
  # splits the sequence.
  def parts(array):
    rest = ((0, 0),) * (array.ndim - 2)
    array = jnp.pad(array, ((0, 0), (0, K * C - T), *rest))
    return jnp.moveaxis(array.reshape(B, C, K, *array.shape[2:]), 2, 0)

  def whole(array_KBC):
    return jnp.moveaxis(array_KBC, 0, 2).reshape(B, C * K)[:, :T]

  made = jax.lax.map(
    lambda part: function(model.logits(part[0]), part[1]),
    (parts(x_BTD), parts(targets_BT)),
  )
  return jax.tree.map(whole, made)


@jax.jit
def _weighted_sum(model, inputs_BT, targets_BT, weights_BT):
  x_BTD, _ = model.hidden(inputs_BT)
  losses_BT = over_logits(token_losses, model, x_BTD, targets_BT)
  # A weight of 0 hides even a NaN that a padded row might hold.
  return jnp.sum(jnp.where(weights_BT > 0, losses_BT * weights_BT, 0.0))


def total_loss(
  model: LanguageModel,
  windows: Windows,
  batch_size: int,
  progress=iter,
) -> float:
  """Summed loss in nats of the weighted targets of all windows.

  Args:
    model: latent, effective or packed.
    windows: inputs, targets and weights, as `data.loader.windows` cuts them.
    batch_size: windows at once; the last batch is filled with weight 0.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    ValueError: batch_size is below 1.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} must be >= 1')
  total = 0.0
  for batch in progress(list(_batches(windows, batch_size))):
    total += float(_weighted_sum(model, *batch))
  return total


def _batches(arrays, batch_size: int) -> Iterable[tuple[np.ndarray, ...]]:
  for start in range(0, len(arrays[0]), batch_size):
    rows = [array[start : start + batch_size] for array in arrays]
    missing = batch_size - len(rows[0])
    yield tuple(np.pad(row, ((0, missing), (0, 0))) for row in rows)
