# SPDX-License-Identifier: Apache-2.0
"""Eight host devices, so that sharding is tested everywhere."""

import os

# Before jax starts; a user's own choice stands.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip()
  )

import jax
import pytest

MACHINES = {'gpu': 'a machine with an NVIDIA GPU', 'tpu': 'a TPU'}


def pytest_collection_modifyitems(items):
  for item in items:
    for marker, machine in MACHINES.items():
      if marker in item.keywords and jax.default_backend() != marker:
        item.add_marker(
          pytest.mark.skip(
            reason=f'runs on {machine}: JAX_PLATFORMS={marker} make test'
          )
        )
