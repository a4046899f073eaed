# SPDX-License-Identifier: Apache-2.0
"""What every benchmark says of itself: how, where and when it was made."""

import datetime
import importlib.metadata
import os
from pathlib import Path
import platform
import sys

import jax
import numpy as np


def machine() -> str:
  """The processor by its own name, its threads, and what JAX runs on."""
  # platform.processor() is 'x86_64' or nothing on Linux.
  cpuinfo = Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  names = [line.split(': ')[1] for line in lines if 'model name' in line]
  processor = (names or [platform.processor() or platform.machine()])[0]
  return (
    f'{processor}, {os.cpu_count()} threads; '
    f'{jax.device_count()} x {jax.devices()[0].device_kind}'
  )


def header() -> dict[str, str]:
  """The first line of a benchmark."""
  return {
    'command': ' '.join(sys.argv),
    'date': datetime.date.today().isoformat(),
    'machine': machine(),
    'python': platform.python_version(),
    **{
      package: importlib.metadata.version(package)
      for package in ('jax', 'jaxlib', 'numpy')
    },
  }


def spread(seconds: list[float]) -> dict[str, float]:
  """Median, least and most, in milliseconds."""
  milliseconds = [1e3 * s for s in seconds]
  return {
    'median_ms': round(float(np.median(milliseconds)), 4),
    'min_ms': round(min(milliseconds), 4),
    'max_ms': round(max(milliseconds), 4),
  }
