# SPDX-License-Identifier: Apache-2.0
"""Next-token cross-entropy.

Shapes: B rows, T tokens, V padded vocabulary.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32
import numpy as np
import optax

from tritera_jax.model.interface import LanguageModel


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


@jax.jit
def _weighted_sum(model, inputs_BT, targets_BT, weights_BT):
  logits_BTV, _ = model(inputs_BT)
  losses_BT = token_losses(logits_BTV, targets_BT)
  # A weight of 0 hides even a NaN that a padded row might hold.
  return jnp.sum(jnp.where(weights_BT > 0, losses_BT * weights_BT, 0.0))


def total_loss(
  model: LanguageModel,
  windows: tuple[
    Int32[np.ndarray, 'W T'],
    Int32[np.ndarray, 'W T'],
    Float[np.ndarray, 'W T'],
  ],
  batch_size: int,
  progress=iter,
) -> float:
  """Summed loss in nats of the weighted targets of all windows.

  Args:
    model: latent, effective or packed.
    windows: inputs, targets and weights, as `data.loader.windows` cuts them.
    batch_size: windows at once; the last batch is filled with weight 0.
    progress: wraps the iterable of batches, as tqdm does.
  """
  total = 0.0
  for batch in progress(list(_batches(windows, batch_size))):
    total += float(_weighted_sum(model, *batch))
  return total


def _batches(arrays, batch_size: int) -> Iterable[tuple[np.ndarray, ...]]:
  for start in range(0, len(arrays[0]), batch_size):
    rows = [array[start : start + batch_size] for array in arrays]
    missing = batch_size - len(rows[0])
    yield tuple(np.pad(row, ((0, missing), (0, 0))) for row in rows)
