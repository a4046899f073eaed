# SPDX-License-Identifier: Apache-2.0
"""How the devices of mesh axis `context` share a sequence.

Device i of n has chunks i and 2n-1-i of the sequence's 2n. In causal
attention a token looks back, so that late chunks are more work than early
ones; of such a pair the work is the same on every device. Everything else in
the model takes tokens in any order, given their positions.

So tokens are arranged once, as integers, before the first layer, and only
what the last one returns is put back: what leaves the model is in order, and
split into n runs.

Shapes: B rows, T tokens, D width, C tokens of a chunk, n devices.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from tritera_jax.parallel import rules

AXIS = 'context'


def devices() -> int:
  """That share each sequence on the mesh in use; 1 without a mesh."""
  return rules.divisor('sequence')


def arrange(arrays_BT: PyTree[Array]) -> PyTree[Array]:
  """Per-token arrays [B, T] in the devices' order, split over them.

  Raises:
    ValueError: the tokens do not make 2n chunks.
  """
  n = devices()
  return arrays_BT if n == 1 else jax.tree.map(_arranged, arrays_BT)


def _arranged(array_BT):
  (B, T), n = array_BT.shape, devices()
  if T % (2 * n):
    raise ValueError(
      f'a sequence of {T} tokens cannot be split over mesh.context={n}: make '
      f'its length a multiple of {2 * n}'
    )
  chunks_BnC = array_BT.reshape(B, 2 * n, -1)
  early_BnC, late_BnC = chunks_BnC[:, :n], chunks_BnC[:, n:][:, ::-1]
  arranged_BT = jnp.stack([early_BnC, late_BnC], 2).reshape(B, T)
  return rules.constrain(arranged_BT, ('batch', 'sequence'))


def merged(x: Float[Array, '*batch K']) -> Float[Array, '*tokens K']:
  """x with one axis of tokens; as it is, if devices share sequences.

  A mesh that splits rows and sequences cannot split their product: XLA would
  gather the sequences first.
  """
  return x.reshape(-1, x.shape[-1]) if devices() == 1 else x


def restore(x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
  """The tokens of `arrange` in order: each device has T/n in a run."""
  return x_BTD if devices() == 1 else _restored(x_BTD)


@jax.custom_vjp
def _restored(x_BTD):
  return _exchanged(x_BTD, inverse=False)


# Its transpose is its inverse. (Of a shard_map that leaves an axis out, JAX
# derives a sum over that axis too.)
_restored.defvjp(
  lambda x_BTD: (_restored(x_BTD), None),
  lambda _, g_BTD: (_exchanged(g_BTD, inverse=True),),
)


def _exchanged(x_BTD, *, inverse: bool):
  """Each device sends each of its two chunks to where it belongs."""
  n = devices()
  split = rules.spec(('batch', 'sequence', None))
  return jax.shard_map(
    functools.partial(_exchange, n, inverse),
    in_specs=split,
    out_specs=split,
    check_vma=False,  # nothing is differentiated through it
  )(x_BTD)


def _exchange(n: int, inverse: bool, x_BTD):
  # In order, device d has chunks 2d and 2d+1. Of chunks i and 2n-1-i one is
  # even, the first if i is: each device sends, and gets, one even, one odd.
  even = [i if i % 2 == 0 else 2 * n - 1 - i for i in range(n)]
  to_even = [(i, even[i] // 2) for i in range(n)]
  to_odd = [(i, (2 * n - 1 - even[i]) // 2) for i in range(n)]
  swapped = jax.lax.axis_index(AXIS) % 2 == 1
  chunks = jnp.split(x_BTD, 2, axis=1)
  if inverse:
    back = ([(b, a) for a, b in pairs] for pairs in (to_even, to_odd))
    chunks = [
      jax.lax.ppermute(chunk, AXIS, pairs)
      for chunk, pairs in zip(chunks, back, strict=True)
    ]
    return jnp.concatenate(_swapped(swapped, *chunks), axis=1)
  chunks = [
    jax.lax.ppermute(chunk, AXIS, pairs)
    for chunk, pairs in zip(
      _swapped(swapped, *chunks), (to_even, to_odd), strict=True
    )
  ]
  return jnp.concatenate(chunks, axis=1)


def _swapped(condition, a, b):
  return jnp.where(condition, b, a), jnp.where(condition, a, b)
