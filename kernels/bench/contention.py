# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel call collapses while another process keeps a core busy.

  python kernels/bench/contention.py [--calls 10000] [--smoke]

A line of JSON alone, then one beside a process that never sleeps: median, 99th
percentile and longest of the calls of one token's matmul. A kernel that splits
its work beforehand and waits loses a scheduler's quantum (milliseconds) each
time a thread of it is not running; this one should lose a chunk.
"""

import argparse
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import record

from tritera_kernels import packed
from tritera_kernels.matmul import ternary_matmul


def timed(calls: int, N: int, K: int) -> np.ndarray:
  """Sorted seconds of each call."""
  rng = np.random.default_rng(0)
  matrix = packed.pack(
    jnp.asarray(rng.integers(-1, 2, (N, K)), jnp.int8),
    jnp.ones(1, jnp.float32),
    format='two_bit',
    scale_axis='out',
  )
  x = jnp.asarray(rng.standard_normal((1, K)), jnp.float32)
  run = jax.jit(lambda x, m: ternary_matmul(x, m, activations='int8'))
  jax.block_until_ready(run(x, matrix))
  seconds = np.empty(calls)
  for i in range(calls):
    start = time.perf_counter()
    jax.block_until_ready(run(x, matrix))
    seconds[i] = time.perf_counter() - start
  return np.sort(seconds)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--calls', type=int, default=10_000)
  parser.add_argument('--shape', nargs=2, type=int, default=[8192, 4096])
  parser.add_argument('--smoke', action='store_true', help='small and quick')
  options = parser.parse_args()
  if options.smoke:
    options.calls, options.shape = 20, [64, 64]
  print(json.dumps(record.header()))
  for beside in (0, 1):
    busy = [
      subprocess.Popen([sys.executable, '-c', 'while True: pass'])
      for _ in range(beside)
    ]
    try:
      seconds = timed(options.calls, *options.shape)
    finally:
      for process in busy:
        process.kill()
    median, late = np.quantile(seconds, [0.5, 0.99])
    print(
      json.dumps(
        {
          'busy_processes': beside,
          'calls': options.calls,
          'N': options.shape[0],
          'K': options.shape[1],
          'median_us': round(1e6 * median, 1),
          'p99_us': round(1e6 * late, 1),
          'max_us': round(1e6 * seconds[-1], 1),
          'p99_over_median': round(late / median, 2),
        }
      ),
      flush=True,
    )


if __name__ == '__main__':
  main()
