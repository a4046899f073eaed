# SPDX-License-Identifier: Apache-2.0
"""Causal attention of a sequence that several devices share.

Queries stay, keys and values go from device to device, and each device joins
what its queries see of each block of keys by the blocks' log-sum-exps (Ring
Attention, arXiv 2310.01889). With softmax weights over block b alone giving
o_b, and L_b its log-sum-exp,

  L = log sum_b exp L_b,     o = sum_b exp(L_b - L) o_b.

The backward pass computes weights p = exp(s - L) of scores s again, block by
block (FlashAttention-2, arXiv 2307.08691, algorithm 2), while the gradients of
keys and values travel with them, home at last. With g the gradient of o:

  dv = p^T g,   ds = p (g v^T - sum_h g o),   dq = ds k,   dk = ds^T q.

Tokens are arranged by `parallel.zigzag`: a device has an early chunk 0 and a
late chunk 1. Of its own keys chunk 1 sees chunk 0 whole, and each itself
causally. Of another's, chunk 1 always sees chunk 0 whole; and either chunk 0
sees chunk 0 (if the other's is earlier) or chunk 1 sees chunk 1 (if not). So
every step is two blocks, whole or causal, for everyone, and only documents
need a mask.

Why not gather keys and values at once (Llama 3, arXiv 2407.21783, 3.3.2)? The
bytes are the same, but they are there all at once (TriLM 3.9B, 32k tokens,
bfloat16: 403 MB a layer and row; 100 MB with Spectra-1.1's 6 kv heads), before
any work that could hide them, and queries and keys of two lengths want a mask
where a fused kernel has two cases. (Compiled for a TPU v5e, every hop starts
before a block's work and ends after it.)

What is stored for the backward pass is q, k, v, o and L of this device's
tokens; what is computed at once, the scores of one block.

Shapes: B rows, T tokens of this device, two chunks of C; H query heads, G key
and value heads, R = H / G, h head width; S = C keys of a block; n devices.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32
import numpy as np

from tritera_jax.parallel import rules, zigzag
from tritera_jax.parallel.zigzag import AXIS

SAVED = 'ring_attention'  # by which a remat policy can keep o and L


class BlockAttention(NamedTuple):
  """Attention of a chunk of queries to one of keys, on one device.

  This is all that the ring asks of a device: a fused kernel that returns the
  log-sum-exp, as cuDNN's does, can stand here.

  Attributes:
    forward: (q_BCHh, k_BSGh, v_BSGh, same_BCS, causal) to the output and its
      log-sum-exp [B, C, H], both float32; 0 and -inf for a query that sees
      nothing. same_BCS says where queries may look, beside causality; None:
      everywhere.
    backward: these five and (o_BCHh, lse_BCH, g_BCHh) to this block's share of
      dq, dk and dv, float32; output and log-sum-exp are over all keys.
  """

  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, Array, Array]]


def _scores(q_BCHh, k_BSGh, same_BCS, causal: bool):
  B, C, H, h = q_BCHh.shape
  S, G = k_BSGh.shape[1:3]
  q_BCGRh = q_BCHh.reshape(B, C, G, H // G, h)
  s_BGRCS = _einsum('bcgrh,bsgh->bgrcs', q_BCGRh, k_BSGh) / h**0.5
  if causal:
    seen_CS = jnp.arange(S) <= jnp.arange(C)[:, None]
    s_BGRCS = jnp.where(seen_CS, s_BGRCS, -jnp.inf)
  if same_BCS is not None:
    s_BGRCS = jnp.where(same_BCS[:, None, None], s_BGRCS, -jnp.inf)
  return s_BGRCS


def _unfused_forward(q_BCHh, k_BSGh, v_BSGh, same_BCS, causal):
  s_BGRCS = _scores(q_BCHh, k_BSGh, same_BCS, causal)
  top_BGRC = jnp.max(s_BGRCS, axis=-1)
  # exp(-inf - -inf) would be NaN for a query that sees nothing.
  top_BGRC = jnp.where(jnp.isneginf(top_BGRC), 0, top_BGRC)
  p_BGRCS = jnp.exp(s_BGRCS - top_BGRC[..., None])
  sum_BCGR = jnp.moveaxis(jnp.sum(p_BGRCS, axis=-1), 3, 1)
  y_BCGRh = _einsum('bgrcs,bsgh->bcgrh', p_BGRCS.astype(v_BSGh.dtype), v_BSGh)
  y_BCGRh /= jnp.where(sum_BCGR == 0, 1, sum_BCGR)[..., None]
  lse_BCGR = jnp.log(sum_BCGR) + jnp.moveaxis(top_BGRC, 3, 1)
  return y_BCGRh.reshape(q_BCHh.shape), lse_BCGR.reshape(q_BCHh.shape[:3])


def _unfused_backward(
  q_BCHh, k_BSGh, v_BSGh, same_BCS, causal, o_BCHh, lse_BCH, g_BCHh
):
  B, C, H, h = q_BCHh.shape
  G, dtype = k_BSGh.shape[2], q_BCHh.dtype
  grouped = lambda x: x.reshape(B, C, G, H // G, *x.shape[3:])
  by_score = lambda x_BCH: jnp.moveaxis(grouped(x_BCH), 1, 3)[..., None]
  g_BCGRh = grouped(g_BCHh)
  p_BGRCS = jnp.exp(
    _scores(q_BCHh, k_BSGh, same_BCS, causal) - by_score(lse_BCH)
  )
  dv_BSGh = _einsum('bgrcs,bcgrh->bsgh', p_BGRCS.astype(dtype), g_BCGRh)
  dp_BGRCS = _einsum('bcgrh,bsgh->bgrcs', g_BCGRh, v_BSGh)
  dot_BCH = jnp.sum(g_BCHh.astype(jnp.float32) * o_BCHh, axis=-1)
  ds_BGRCS = p_BGRCS * (dp_BGRCS - by_score(dot_BCH)) / h**0.5
  ds_BGRCS = ds_BGRCS.astype(dtype)
  dq_BCGRh = _einsum('bgrcs,bsgh->bcgrh', ds_BGRCS, k_BSGh)
  dk_BSGh = _einsum('bgrcs,bcgrh->bsgh', ds_BGRCS, grouped(q_BCHh))
  return dq_BCGRh.reshape(q_BCHh.shape), dk_BSGh, dv_BSGh


def _einsum(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


# The scores of a block [B, G, R, C, S] exist, in float32.
UNFUSED = BlockAttention(_unfused_forward, _unfused_backward)


def attention(
  q_BTHh: Float[Array, 'B T H h'],
  k_BTGh: Float[Array, 'B T G h'],
  v_BTGh: Float[Array, 'B T G h'],
  documents_BT: Int32[Array, 'B T'] | None = None,
  block: BlockAttention = UNFUSED,
) -> Float[Array, 'B T H h']:
  """Causal attention, within documents, over the mesh's `context` axis.

  Args:
    q_BTHh: rotated queries, tokens arranged by `zigzag.arrange`.
    k_BTGh: rotated keys, arranged so too.
    v_BTGh: values.
    documents_BT: number of each token's document; None: there is but one.
    block: what computes on one device.
  """
  return _ring(block, q_BTHh, k_BTGh, v_BTGh, documents_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(block, q_BTHh, k_BTGh, v_BTGh, documents_BT):
  return _forward(block, q_BTHh, k_BTGh, v_BTGh, documents_BT)[0]


def _forward(block, q_BTHh, k_BTGh, v_BTGh, documents_BT):
  local = functools.partial(_local_forward, block, zigzag.devices())
  o_BTHh, lse_BTH = _mapped(
    local, (_QUERY, _KEY, _KEY, _TOKEN), (_QUERY, _QUERY[:3])
  )(q_BTHh, k_BTGh, v_BTGh, documents_BT)
  o_BTHh, lse_BTH = (checkpoint_name(x, SAVED) for x in (o_BTHh, lse_BTH))
  return o_BTHh, (q_BTHh, k_BTGh, v_BTGh, documents_BT, o_BTHh, lse_BTH)


def _backward(block, residuals, g_BTHh):
  local = functools.partial(_local_backward, block, zigzag.devices())
  gradients = _mapped(
    local,
    (_QUERY, _KEY, _KEY, _TOKEN, _QUERY, _QUERY[:3], _QUERY),
    (_QUERY, _KEY, _KEY),
  )(*residuals, g_BTHh)
  return *gradients, None


_ring.defvjp(_forward, _backward)

_TOKEN = ('batch', 'sequence')
_QUERY = (*_TOKEN, 'heads', None)
_KEY = (*_TOKEN, 'kv_heads', None)


def _mapped(local, inputs, outputs):
  return jax.shard_map(
    local,
    in_specs=tuple(map(rules.spec, inputs)),
    out_specs=tuple(map(rules.spec, outputs)),
    check_vma=False,  # nothing is differentiated through it
  )


class _Keys(NamedTuple):
  """What goes round: both chunks of a device, [B, 2, C, ...] each."""

  k: Array
  v: Array
  documents: Array | None


def _local_forward(block, n, q_BTHh, k_BTGh, v_BTGh, documents_BT):
  B, T, H, _ = q_BTHh.shape
  mine = _chunked((q_BTHh, documents_BT))
  own = _chunked(_Keys(k_BTGh, v_BTGh, documents_BT))

  def add(seen, keys, pairs, causal=False):
    """Output and log-sum-exp, over these blocks of keys too."""

    def one(seen, pair):
      to, at = pair
      q_BCHh, documents_BC = _chunk(mine, to)
      k_BSGh, v_BSGh, documents_BS = _chunk(keys, at)
      same_BCS = _same(documents_BC, documents_BS)
      found = block.forward(q_BCHh, k_BSGh, v_BSGh, same_BCS, causal)
      both = _joined(_chunk(seen, to), found)
      return tuple(
        jax.lax.dynamic_update_index_in_dim(whole, chunk, to, 1)
        for whole, chunk in zip(seen, both, strict=True)
      ), None

    return jax.lax.scan(one, seen, pairs)[0]

  def step(carry, number):
    seen, keys = carry
    # Keys are sent before they are looked at: the wire and the work overlap.
    after = _sent(n, keys)
    return (add(seen, keys, _pairs(number)), after), None

  seen = (
    jnp.zeros(mine[0].shape, jnp.float32),
    jnp.full(mine[0].shape[:-1], -jnp.inf),
  )
  seen = add(add(seen, own, _EACH_ITSELF, causal=True), own, _LATE_TO_EARLY)
  (seen, keys), _ = jax.lax.scan(
    step, (seen, _sent(n, own)), jnp.arange(1, n - 1)
  )
  o_B2CHh, lse_B2CH = add(seen, keys, _pairs(n - 1))
  o_BTHh = o_B2CHh.reshape(q_BTHh.shape).astype(q_BTHh.dtype)
  return o_BTHh, lse_B2CH.reshape(B, T, H)


def _local_backward(
  block, n, q_BTHh, k_BTGh, v_BTGh, documents_BT, o_BTHh, lse_BTH, g_BTHh
):
  mine = _chunked((q_BTHh, documents_BT, o_BTHh, lse_BTH, g_BTHh))
  own = _chunked(_Keys(k_BTGh, v_BTGh, documents_BT))

  def add(gradients, keys, pairs, causal=False):
    """Gradients of queries, keys and values, with these blocks' share."""

    def one(gradients, pair):
      to, at = pair
      q_BCHh, documents_BC, *rest = _chunk(mine, to)
      k_BSGh, v_BSGh, documents_BS = _chunk(keys, at)
      same_BCS = _same(documents_BC, documents_BS)
      shares = block.backward(q_BCHh, k_BSGh, v_BSGh, same_BCS, causal, *rest)
      return tuple(
        whole.at[:, index].add(share)
        for whole, index, share in zip(
          gradients, (to, at, at), shares, strict=True
        )
      ), None

    return jax.lax.scan(one, gradients, pairs)[0]

  def added(dq, of_keys, keys, pairs):
    # The sum so far arrives while this device's share is computed.
    so_far = _sent(n, of_keys)
    dq, *share = add((dq, *zeros), keys, pairs)
    return dq, tuple(map(jnp.add, so_far, share))

  def step(carry, number):
    dq, of_keys, keys = carry
    after = _sent(n, keys)
    return (*added(dq, of_keys, keys, _pairs(number)), after), None

  zero = lambda x_B2C: jnp.zeros(x_B2C.shape, jnp.float32)
  zeros = zero(own.k), zero(own.v)
  gradients = add((zero(mine[0]), *zeros), own, _EACH_ITSELF, causal=True)
  dq, *of_keys = add(gradients, own, _LATE_TO_EARLY)
  carry = dq, tuple(of_keys), _sent(n, own)
  (dq, of_keys, keys), _ = jax.lax.scan(step, carry, jnp.arange(1, n - 1))
  dq, of_keys = added(dq, of_keys, keys, _pairs(n - 1))
  return tuple(
    gradient.reshape(x.shape).astype(x.dtype)
    for gradient, x in zip(
      (dq, *_sent(n, of_keys)), (q_BTHh, k_BTGh, v_BTGh), strict=True
    )
  )


# Blocks as chunks of queries and chunks of keys. They are looped over, so that
# the scores of one are there at a time.
_EACH_ITSELF = np.array([0, 1]), np.array([0, 1])
_LATE_TO_EARLY = np.array([1]), np.array([0])


def _pairs(step):
  """The blocks of the keys that have come `step` hops."""
  # Those of a later device have been past the end of the ring.
  of_later = (jax.lax.axis_index(AXIS) < step).astype(jnp.int32)
  return jnp.stack([1, of_later]), jnp.stack([0, of_later])


def _sent(n: int, arrays: Any) -> Any:
  """To the next device of the ring."""
  return jax.lax.ppermute(arrays, AXIS, [(i, (i + 1) % n) for i in range(n)])


def _chunked(arrays: Any) -> Any:
  """[B, T, ...] to [B, 2, C, ...]."""
  return jax.tree.map(
    lambda a: a.reshape(a.shape[0], 2, -1, *a.shape[2:]), arrays
  )


def _chunk(arrays: Any, index: int | Array) -> Any:
  """[B, 2, C, ...] to [B, C, ...]."""
  return jax.tree.map(
    lambda a: jax.lax.dynamic_index_in_dim(a, index, 1, keepdims=False), arrays
  )


def _same(documents_BC, documents_BS):
  if documents_BC is None:
    return None
  return documents_BC[:, :, None] == documents_BS[:, None]


def _joined(a, b):
  """Output and log-sum-exp over the keys of both."""
  (a_BCHh, a_BCH), (b_BCHh, b_BCH) = a, b
  lse_BCH = jnp.logaddexp(a_BCH, b_BCH)
  # A query sees itself first, so that lse is finite.
  part = lambda o_BCHh, part_BCH: (
    jnp.exp(part_BCH - lse_BCH)[..., None] * o_BCHh
  )
  return part(a_BCHh, a_BCH) + part(b_BCHh, b_BCH), lse_BCH
