# SPDX-License-Identifier: Apache-2.0
"""Times every implementation of `ternary_matmul` against XLA's dense dots.

  python kernels/bench/matmul.py [--shapes NAME ...] [--m M ...] [--smoke]

A line of JSON for each (shape, M, implementation): median, least and most of
the timed calls, gigabytes of weights a second, and the speed relative to the
faster dense dot of the same run; machine, date, versions and command come
first. Weights are random. Each shape cycles through enough distinct matrices
that none is in a cache when its turn comes, unless --smoke.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import record

from tritera_kernels import formats, packed
from tritera_kernels.matmul import api

# N outputs, K inputs: the linear layers of TriLM 1.1B and 3.9B, and one that
# the tests of this script can afford.
SHAPES = {
  'small': (256, 256),
  '1.1b_qo': (1792, 1792),
  '1.1b_up': (5120, 1792),
  '3.9b_qo': (3072, 3072),
  '3.9b_up': (9216, 3072),
  '3.9b_down': (3072, 9216),
}
CACHE_BYTES = 2**28


def timed(function, arguments: list, calls: int) -> list[float]:
  """Seconds of each call; the arguments take turns, after a warm-up."""
  for argument in arguments[:2]:
    jax.block_until_ready(function(argument))
  seconds = []
  for i in range(calls):
    argument = arguments[i % len(arguments)]
    start = time.perf_counter()
    jax.block_until_ready(function(argument))
    seconds.append(time.perf_counter() - start)
  return seconds


def candidates(N: int, K: int, x, rng, smoke: bool):
  """(name, function of one weight, weights) of each contender."""

  def copies(weight_bytes: int) -> int:
    return 2 if smoke else max(2, CACHE_BYTES // weight_bytes)

  for dtype in (jnp.float32, jnp.bfloat16):
    weights = [
      jnp.asarray(rng.standard_normal((K, N)), dtype)
      for _ in range(copies(K * N * jnp.dtype(dtype).itemsize))
    ]
    x_cast = x.astype(dtype)
    dense = jax.jit(
      lambda w, x_cast=x_cast: jnp.dot(
        x_cast, w, preferred_element_type=jnp.float32
      )
    )
    yield f'dense {jnp.dtype(dtype).name}', dense, weights

  target = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  for format in formats.FORMATS:
    codes = rng.integers(-1, 2, (N, K)).astype(np.int8)
    scale = jnp.asarray([0.05], jnp.float32)
    first = packed.pack(
      jnp.asarray(codes), scale, format=format, scale_axis='out'
    )
    weights = [
      jax.tree.map(jnp.copy, first) for _ in range(copies(first.data.nbytes))
    ]
    for implementation in api.IMPLEMENTATIONS:
      for activations in ('float', 'int8'):
        name = f'{implementation.name} {format} {activations}'
        reason = implementation.reason(
          target, (x, first), {'activations': activations}
        )
        if reason is not None:
          print(json.dumps({'name': name, 'refused': reason}))
          continue
        yield (
          name,
          jax.jit(
            lambda w, activations=activations, chosen=implementation.name: (
              api.ternary_matmul(
                x, w, activations=activations, implementation=chosen
              )
            )
          ),
          weights,
        )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--shapes', nargs='+', choices=SHAPES, default=['3.9b_qo']
  )
  parser.add_argument('--m', nargs='+', type=int, default=[1, 32])
  parser.add_argument('--calls', type=int, default=30)
  parser.add_argument('--smoke', action='store_true', help='small and quick')
  options = parser.parse_args()
  if options.smoke:
    options.shapes, options.m, options.calls = ['small'], [1], 3

  print(json.dumps(record.header()))
  rng = np.random.default_rng(0)
  for shape in options.shapes:
    N, K = SHAPES[shape]
    for M in options.m:
      x = jnp.asarray(rng.standard_normal((M, K)), jnp.float32)
      dense = float('inf')
      for name, function, weights in candidates(N, K, x, rng, options.smoke):
        seconds = timed(function, weights, options.calls)
        median = float(np.median(seconds))
        if name.startswith('dense'):
          dense = min(dense, median)
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights[0]))
        print(
          json.dumps(
            {
              'shape': shape, 'N': N, 'K': K, 'M': M, 'name': name,
              **record.spread(seconds),
              'weights_gb_per_s': round(weight_bytes / median / 1e9, 3),
              'times_dense': round(dense / median, 3),
            }
          ),
          flush=True,
        )  # fmt: skip


if __name__ == '__main__':
  main()
