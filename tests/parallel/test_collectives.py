# SPDX-License-Identifier: Apache-2.0
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import pytest

from tritera_jax.parallel import collectives

HLO = Path(__file__).parent / 'hlo'
ROUND = [(n, (n + 1) % 4) for n in range(4)]


def compiled(local, spec_in, spec_out, x):
  """The program of `local` on 2 x 4 devices."""
  mesh = jax.make_mesh((2, 4), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=spec_in, out_specs=spec_out, check_vma=False
  )
  return jax.jit(mapped).lower(x).compile()


X = jax.ShapeDtypeStruct((16, 24), jnp.float32)  # 1536 bytes
ROW = ((0, 1, 2, 3), (4, 5, 6, 7))
COLUMN = ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize(
  ('local', 'spec_in', 'spec_out', 'op', 'sent', 'groups'),
  [
    # The whole is 1536 bytes; a ring hands on all but one of four parts.
    (
      functools.partial(jax.lax.all_gather, axis_name='b', tiled=True),
      P('b'), P(), 'all-gather', 1536 * 3 // 4, ROW,
    ),
    # Two of [8, 24] each: reduce-scatter and all-gather of halves.
    (
      functools.partial(jax.lax.psum, axis_name='a'),
      P('a'), P(), 'all-reduce', 2 * 768 // 2, COLUMN,
    ),
    (
      functools.partial(jax.lax.psum_scatter, axis_name='b', tiled=True),
      P(), P('b'), 'reduce-scatter', 1536 * 3 // 4, ROW,
    ),
    # Rows become columns: a fourth of [4, 24] stays.
    (
      functools.partial(
        jax.lax.all_to_all, axis_name='b', split_axis=1, concat_axis=0,
        tiled=True,
      ),
      P('b'), P(None, 'b'), 'all-to-all', 384 * 3 // 4, ROW,
    ),
    (
      functools.partial(
        jax.lax.ppermute, axis_name='b', perm=ROUND
      ),
      P('b'), P('b'), 'collective-permute', 384,
      tuple((n, n // 4 * 4 + (n + 1) % 4) for n in range(8)),
    ),
  ],
)  # fmt: skip
def test_bytes_are_those_of_the_algebra(
  local, spec_in, spec_out, op, sent, groups
):
  program = compiled(local, spec_in, spec_out, X)
  (one,) = collectives.of(program)
  assert (one.op, one.bytes, one.times) == (op, sent, 1)
  assert one.groups == groups
  assert collectives.bytes_per_device([one]) == {op: sent}


def test_loops_multiply():
  def body(x, _):
    x, _ = jax.lax.scan(lambda x, _: (jax.lax.psum(x, 'b') / 4, None), x,
                        length=3)  # fmt: skip
    return jax.lax.ppermute(x, 'a', [(0, 1), (1, 0)]), None

  program = compiled(
    lambda x: jax.lax.scan(body, x, length=5)[0], P('a'), P('a'), X
  )
  # 768 bytes: 15 all-reduces over four, 5 swaps.
  assert collectives.bytes_per_device(collectives.of(program)) == {
    'all-reduce': 15 * 2 * 768 * 3 // 4,
    'collective-permute': 5 * 768,
  }


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused():
  def local(x):
    more = lambda x: jnp.sum(x) < 100
    return jax.lax.while_loop(more, lambda x: jax.lax.psum(x, 'b'), x)

  with pytest.raises(ValueError, match='does not say how often .*lax.scan'):
    collectives.of(compiled(local, P(), P(), X))


def test_a_program_without_a_mesh_sends_nothing():
  program = jax.jit(lambda x: x @ x.T).lower(X).compile()
  assert collectives.of(program) == []


def test_the_program_of_a_tpu():
  """A loop without its count, an asynchronous gather as a chain of fusions, a
  reduce-scatter as an all-reduce in a fusion."""
  gather, scatter = collectives.of((HLO / 'tpu.txt').read_text())
  assert (gather.op, gather.times, gather.bytes) == ('all-gather', 7, 1536)
  assert gather.source == 'jit(f)/gather'
  assert gather.groups == scatter.groups == ((0, 1, 2, 3),)
  # 2048 and 512 bytes before the sum; one part of four is a device's own.
  assert (scatter.op, scatter.times) == ('reduce-scatter', 7)
  assert scatter.bytes == (2048 + 512) * 3 // 4


def test_the_program_of_a_gpu():
  """Starts and dones, by name and wrapped."""
  gather, reduce, scatter = collectives.of((HLO / 'gpu.txt').read_text())
  assert gather.bytes == (60 + 12) * 3 // 4
  assert gather.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
  assert reduce.bytes == 48
  assert reduce.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
  assert scatter.bytes == 7 * 16
  assert collectives.bytes_per_device([gather, reduce, scatter]) == {
    'all-gather': 54, 'all-reduce': 48, 'reduce-scatter': 112,
  }  # fmt: skip


@pytest.mark.parametrize(
  ('text', 'groups'),
  [
    ('{}, dimensions={0}', ((0, 1, 2, 3, 4, 5, 6, 7),)),
    ('{{0,3},{1,2}}, to_apply=%add', ((0, 3), (1, 2))),
    ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}, x=1",
     ((0, 1, 4, 5), (2, 3, 6, 7))),
    # The outer and the inner half of an axis of four.
    ("mesh['x'=4,'y'=2] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['x'=4] {'x':(2)2}, y=2", ((0, 1), (2, 3))),
    ("mesh['x'=2,'y'=2], device_ids=([4]<=[2,2]T(1,0)) {'y'}",
     ((0, 2), (1, 3))),
    ("mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", ((3, 1), (2, 0))),
  ],
)  # fmt: skip
def test_groups_in_each_notation(text, groups):
  program = f"""HloModule m, num_partitions=8

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%p), replica_groups={text}
}}
"""
  (one,) = collectives.of(program)
  assert one.groups == groups
