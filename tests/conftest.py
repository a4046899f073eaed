# SPDX-License-Identifier: Apache-2.0
"""Eight host devices, so that sharding is tested everywhere."""

from collections.abc import Callable
import fcntl
import os
import shutil
import tempfile

# Before jax starts; a user's own choice stands.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip()
  )

# Many tests train the same model: it is compiled once a session, for all of
# xdist's workers, which inherit this, and for the processes that tests start.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _CACHE = tempfile.TemporaryDirectory(prefix='jax-cache-')
  os.environ |= {
    'JAX_COMPILATION_CACHE_DIR': _CACHE.name,
    # A cache with a limit is locked: others never read half an entry.
    'JAX_COMPILATION_CACHE_MAX_SIZE': str(2**33),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
  }

from pathlib import Path

import jax
import pytest

from tests import tiny
from tritera_jax.checkpoint import pack
from tritera_jax.train import loop

MACHINES = {'gpu': 'a machine with an NVIDIA GPU', 'tpu': 'a TPU'}


def pytest_collection_modifyitems(items):
  for item in items:
    for marker, machine in MACHINES.items():
      wanted = item.get_closest_marker(marker)
      if wanted and jax.default_backend() != marker:
        item.add_marker(
          pytest.mark.skip(
            reason=f'runs on {machine}: JAX_PLATFORMS={marker} make test'
          )
        )


@pytest.fixture(scope='session')
def made_once(tmp_path_factory):
  """Has a folder made by the first of xdist's workers that wants it."""
  shared = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    shared = shared.parent

  def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, to be read and not written."""
    folder, made = shared / name, shared / f'{name}.made'
    with (shared / f'{name}.lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not made.exists():
        make(folder)
        made.touch()
    return folder

  return made_once


@pytest.fixture(scope='session')
def tiny_data(made_once) -> Path:
  """A dataset, to be read and not written."""
  return made_once('tiny_data', tiny.dataset)


@pytest.fixture(scope='session')
def tiny_run(tiny_data, made_once, tmp_path_factory) -> Path:
  """A trained and packed run."""

  def make(folder: Path):
    loop.train(tiny.experiment(tiny_data, folder, 20), quiet=True)
    for format in ('two_bit', 'base_three'):
      pack.pack(folder, format)

  made = made_once('tiny_run', make)
  # Each worker its own: a few tests plot or pack it again.
  return shutil.copytree(made, tmp_path_factory.mktemp('tiny') / 'run')
