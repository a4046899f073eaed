# SPDX-License-Identifier: Apache-2.0
"""Against softmax attention written out in NumPy float64."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import oracle
from tests.model.test_decoder import TINY, parameters
from tritera_jax.model import decoder, ring
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel import rules, zigzag
from tritera_jax.parallel.mesh import MeshConfig

B, T, H, G, h = 2, 48, 4, 2, 6
MESHES = {
  'two': MeshConfig(fsdp=1, context=2),
  'three': MeshConfig(fsdp=1, context=3),
  'eight': MeshConfig(fsdp=1, context=8),
  'all': MeshConfig(data=2, fsdp=1, context=2, tensor=2),
}


def mesh_of(config):
  sizes = config.data, config.fsdp, config.context, config.tensor
  return mesh_lib.make_mesh(config, jax.devices()[: int(np.prod(sizes))])


def inputs(dtype=np.float32):
  """Queries, keys, values, a gradient, and documents that cross chunks."""
  rng = np.random.default_rng(0)
  shapes = (B, T, H, h), (B, T, G, h), (B, T, G, h), (B, T, H, h)
  arrays = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
  # A document of one token, one of half a sequence; one from the first token.
  documents = np.cumsum(np.isin(np.arange(T), [5, 6, 30]), dtype=np.int32)
  return *arrays, np.stack([documents, 0 * documents])


def whole(q, k, v, g, documents):
  """Output, and gradients of q, k and v, of one row's whole scores."""
  q, k, v, g = (np.asarray(a, np.float64) for a in (q, k, v, g))
  place = np.arange(len(q))
  seen = (place[:, None] >= place) & (documents[:, None] == documents)
  out, dq, dk, dv = (np.zeros_like(a) for a in (q, q, k, v))
  for head in range(q.shape[1]):
    kv = head * k.shape[1] // q.shape[1]
    score = np.where(seen, q[:, head] @ k[:, kv].T / np.sqrt(h), -np.inf)
    p = np.exp(score - score.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    out[:, head] = p @ v[:, kv]
    dp = g[:, head] @ v[:, kv].T
    ds = p * (dp - (p * dp).sum(1, keepdims=True)) / np.sqrt(h)
    dq[:, head] = ds @ k[:, kv]
    dk[:, kv] += ds.T @ q[:, head]
    dv[:, kv] += p.T @ g[:, head]
  return out, dq, dk, dv


def test_the_oracle_s_gradients_are_its_differences():
  q, k, v, g, documents = (a[0] for a in inputs(np.float64))
  rng = np.random.default_rng(1)
  along = [rng.standard_normal(a.shape) for a in (q, k, v)]

  def total(step):
    moved = [a + step * d for a, d in zip((q, k, v), along, strict=True)]
    return (g * whole(*moved, g, documents)[0]).sum()

  _, *gradients = whole(q, k, v, g, documents)
  assert (total(1e-6) - total(-1e-6)) / 2e-6 == pytest.approx(
    sum((a * b).sum() for a, b in zip(gradients, along, strict=True)), rel=1e-6
  )


def in_order(x_BTHh):
  """The ring's tokens back in order."""
  return zigzag.restore(x_BTHh.reshape(*x_BTHh.shape[:2], -1)).reshape(
    x_BTHh.shape
  )


def arranged(arrays):
  """Arrays [B, T, ...] in the ring's order, where they belong."""
  place = zigzag.arrange(jnp.broadcast_to(jnp.arange(T), (B, T)))
  return jax.tree.map(
    lambda a: jax.vmap(lambda a, place: a[place])(a, place), arrays
  )


# Compiles in half the time.
quickly = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def program(in_documents: bool):
  @quickly
  def run(q, k, v, g, documents):
    *arrays, g, documents = arranged((q, k, v, g, documents))
    attend = lambda q, k, v: ring.attention(
      q, k, v, documents if in_documents else None
    )
    out, pullback = jax.vjp(attend, *arrays)
    return [in_order(a) for a in (out, *pullback(g))]

  return run


@pytest.mark.parametrize(('name', 'in_documents'), [
  ('two', True), ('three', False), ('eight', True), ('all', True),
])  # fmt: skip
def test_the_ring_gives_the_oracle_s_attention_and_gradients(
  name, in_documents
):
  *arrays, documents = inputs()
  with jax.set_mesh(mesh_of(MESHES[name])):
    got = program(in_documents)(*arrays, documents)
  for row in range(B):
    of_row = documents[row] if in_documents else 0 * documents[row]
    want = whole(*(a[row] for a in arrays), of_row)
    for ours, theirs in zip(got, want, strict=True):
      np.testing.assert_allclose(
        ours[row], theirs, rtol=0, atol=3e-6 * np.abs(theirs).max()
      )


def test_bfloat16_is_summed_in_float32():
  *arrays, documents = inputs()
  halves = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
  with jax.set_mesh(mesh_of(MESHES['three'])):
    got = program(True)(*halves, documents)
  wide = [np.asarray(a.astype(jnp.float32)) for a in halves]
  for row in range(B):
    want = whole(*(a[row] for a in wide), documents[row])
    for ours, theirs in zip(got, want, strict=True):
      assert ours.dtype == jnp.bfloat16
      # Weights and results are rounded once, sums over the ring are not.
      np.testing.assert_allclose(
        ours[row].astype(jnp.float32), theirs, rtol=0,
        atol=2**-7 * np.abs(theirs).max(),
      )  # fmt: skip


@pytest.mark.parametrize('n', [2, 4])
def test_keys_go_round_once_and_nothing_grows_with_the_sequence(n):
  def total(q, k, v):
    return jnp.sum(ring.attention(q, k, v))

  T, C = 2048, 2048 // n // 2
  mesh = mesh_of(MeshConfig(fsdp=1, context=n))
  split = rules.shardings(mesh, ('batch', 'sequence', None, None))
  shape = lambda heads: jax.ShapeDtypeStruct(
    (1, T, heads, h), jnp.float32, sharding=split
  )
  with jax.set_mesh(mesh):
    arrays = shape(H), shape(G), shape(G)
    found = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
  shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', found.as_text())
  largest = max(
    np.prod([int(x) for x in shape.split(',')], dtype=int) for shape in shapes
  )
  assert largest == H * C * C  # one block's scores
  moved = set(
    re.findall(r'(\w+\[[\d,]+\])\S* collective-permute\(', found.as_text())
  )
  assert moved == {f'f32[1,2,{C},{G},{h}]'}  # keys, values, their gradients
  assert not re.findall(r'all-gather|all-to-all|all-reduce', found.as_text())
  # Scores, weights, their gradients, masks and copies of one block.
  used = found.memory_analysis().temp_size_in_bytes
  assert used < 10 * 4 * H * C * C


def test_a_model_s_logits_are_the_numpy_decoder_s_of_each_document():
  config = dataclasses.replace(
    TINY, kv_heads=2, qk_norm=True, document_separator=7, context_length=32
  )
  params = parameters(config)
  rng = np.random.default_rng(1)
  tokens = rng.integers(8, config.vocab_size, (2, 32))
  tokens[0, [3, 4, 20]] = tokens[1, 0] = 7
  with jax.set_mesh(mesh_of(MESHES['all'])):
    forward = quickly(lambda params, tokens: decoder.bind(config, params)(
      tokens
    )[0])  # fmt: skip
    logits = forward(params, jnp.asarray(tokens, jnp.int32))
  for row in range(2):
    starts = [*np.flatnonzero(tokens[row] == 7)]
    for start, stop in zip([0, *starts], [*starts, 32], strict=True):
      if start == stop:
        continue
      want = oracle.decoder(config, params, tokens[row, start:stop])
      np.testing.assert_allclose(
        logits[row, start:stop], want, atol=2e-5 * np.abs(want).max()
      )
