# SPDX-License-Identifier: Apache-2.0
"""This machine as a target, and how far the estimates are from a run on it."""

import contextlib
import os
from pathlib import Path
import re
import statistics
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from tritera_jax.experiment import Experiment
from tritera_jax.parallel import collectives
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.plan import choices, costs, targets
from tritera_jax.plan.targets import Chip, Target
from tritera_jax.train.timing import Stepper

_WIDTH = 2048  # of the matrices whose product is the peak
_COPY_BYTES = 1 << 28  # past any cache of ours
_SECONDS = 1.0  # to measure each for


def measured(experiment: Experiment) -> Target:
  """This machine: by the data sheet if its devices have one, else measured.

  All devices work at once, for on a CPU they share cores and memory. What
  they send each other goes through that memory.
  """
  devices = jax.devices()
  kind, count = devices[0].device_kind, len(devices)
  for chip in targets.CHIPS.values():
    if kind.startswith(chip.kind) and experiment.model.dtype == 'bfloat16':
      return Target('here', chip, count)
  peak, bandwidth = _rates(experiment.model.dtype, devices)
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / count
  stats = devices[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    memory = float(stats['bytes_limit'])
  chip = Chip(
    kind, peak, memory, bandwidth, bandwidth, bandwidth, count,
    source='measured here, now'
  )  # fmt: skip
  return Target('here', chip, count)


def _rates(dtype: str, devices: list) -> tuple[float, float]:
  """FLOP/s of a product and bytes/s of a copy, of one of the devices."""
  mesh = jax.make_mesh(
    (len(devices),), ('all',), devices=devices,
    axis_types=(jax.sharding.AxisType.Auto,)
  )  # fmt: skip
  split = NamedSharding(mesh, PartitionSpec('all'))

  def best(function, x, donate: bool) -> float:
    function = jax.jit(
      function, out_shardings=split, donate_argnums=0 if donate else None
    )
    x = jax.device_put(x, split)
    times, end = [], time.perf_counter() + _SECONDS
    while len(times) < 2 or time.perf_counter() < end:
      started = time.perf_counter()
      y = jax.block_until_ready(function(x))
      times.append(time.perf_counter() - started)
      x = y if donate else x
    return min(times[1:])  # the first compiles

  n = len(devices)
  x_nKK = np.ones((n, _WIDTH, _WIDTH), jnp.dtype(dtype))
  product = best(lambda x: jax.lax.batch_matmul(x, x), x_nKK, donate=False)
  # In place: new memory would be found page by page.
  x_nB = np.ones((n, _COPY_BYTES // n // 4), np.float32)
  copy = best(lambda x: x + 1, x_nB, donate=True)
  return 2 * _WIDTH**3 / product, 2 * x_nB[0].nbytes / copy


def check(experiment: Experiment, target: Target, steps: int) -> str:
  """Trains so many steps by the experiment's own mesh; a table of ratios."""
  own = choices.own(experiment, target)
  cost = own.costs
  stepper = Stepper(own.experiment, mesh_lib.make_mesh(own.experiment.mesh))
  _forget_peak()  # the compiler's
  before = _resident('VmRSS')
  stepper.seconds(2)
  times = [stepper.seconds(1) for _ in range(steps)]
  seconds = statistics.median(times)
  memory = stepper.memory()
  sent = collectives.bytes_per_device(collectives.of(stepper.compiled))
  here, temporaries = target.devices, cost.peak_memory - cost.memory['state']
  rows = [
    ('step, s', cost.seconds, seconds),
    ('least step, s', cost.least, min(times)),
    ('state, MB a device', cost.memory['state'] / 1e6,
     memory['arguments'] / 1e6),
    ('temporaries, MB a device',
     temporaries / 1e6, memory['temporaries'] / 1e6),
    ('the same of all; measured: growth of the process',
     here * temporaries / 1e6, (_resident('VmHWM') - before) / 1e6),
    ('collectives, MB a device', sum(c.bytes for c in cost.collectives) / 1e6,
     sum(sent.values()) / 1e6),
  ]  # fmt: skip
  mfu = costs.mfu(experiment, target, seconds)
  chip = target.chip
  lines = [
    f'{here} x {chip.kind}: {chip.peak / 1e9:.4g} GFLOP/s, '
    f'{chip.bandwidth / 1e9:.4g} GB/s a device ({chip.source})',
    f'{own.flags}; terms of the estimate: compute {cost.compute:.3g} s, memory '
    f'traffic {cost.reading:.3g} s, network {cost.network:.3g} s',
    f'{steps} steps on random tokens, from {min(times):.4g} to '
    f'{max(times):.4g} s; MFU {mfu:.1%} of the peak above',
    '',
    f'{"":<49}{"estimate":>10}{"measured":>10}{"ratio":>8}',
  ]
  for name, estimate, got in rows:
    ratio = f'{got / estimate:8.2f}' if estimate else ' ' * 8
    lines.append(f'{name:<49}{estimate:>10.4g}{got:>10.4g}{ratio}')
  return '\n'.join(lines)


def _resident(field: str) -> float:
  """Bytes of this process by Linux: VmRSS now, VmHWM at most; else NaN."""
  try:
    text = Path('/proc/self/status').read_text()
  except OSError:
    return float('nan')
  found = re.search(rf'{field}:\s+(\d+) kB', text)
  return 1024.0 * int(found[1]) if found else float('nan')


def _forget_peak():
  """Lets VmHWM start anew at VmRSS, where Linux allows it."""
  with contextlib.suppress(OSError):
    Path('/proc/self/clear_refs').write_text('5')
