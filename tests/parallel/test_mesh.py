# SPDX-License-Identifier: Apache-2.0
import types

import numpy as np
import pytest

from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig


def gpus(hosts, each, *, processes_each=1):
  """GPUs as JAX shows them, with a slice_index for each host."""
  return [
    types.SimpleNamespace(
      id=n, platform='gpu', device_kind='H100', slice_index=n // each,
      process_index=n * processes_each // each,
    )
    for n in range(hosts * each)
  ]  # fmt: skip


def spanning(devices) -> set[str]:
  """Axes along which two neighbours lie on different hosts."""
  host = np.vectorize(lambda device: device.slice_index)(devices)
  return {
    name
    for axis, name in enumerate(mesh_lib.AXES)
    if (np.diff(host, axis=axis) != 0).any()
  }


@pytest.mark.parametrize(
  ('config', 'hosts', 'each', 'shape'),
  [
    (MeshConfig(data=4, fsdp=8, across=('data',)), 4, 8, (4, 8, 1, 1)),
    (MeshConfig(fsdp=-1, across=('fsdp',)), 4, 8, (1, 32, 1, 1)),
    (MeshConfig(2, -1, 4, across=('data', 'fsdp')), 4, 8, (2, 4, 1, 4)),
    # 6 hosts: 2 of them along data, 3 along fsdp.
    (MeshConfig(4, 3, 4, across=('data', 'fsdp')), 6, 8, (4, 3, 1, 4)),
    (MeshConfig(fsdp=8, across=('data',)), 1, 8, (1, 8, 1, 1)),
    # A sequence's devices side by side: two hosts of each ring.
    (
      MeshConfig(2, -1, 2, context=4, across=('data', 'context')),
      4,
      8,
      (2, 2, 4, 2),
    ),
  ],
)
@pytest.mark.parametrize('processes_each', [1, 8])
def test_only_the_axes_named_span_hosts(
  config, hosts, each, shape, processes_each
):
  devices = gpus(hosts, each, processes_each=processes_each)
  placed = mesh_lib.hybrid(config, devices)
  assert placed.shape == shape
  assert sorted(device.id for device in placed.flat) == list(
    range(len(devices))
  )
  assert spanning(placed) <= (set(config.across) if hosts > 1 else set())


def test_axes_that_cannot_span_the_hosts_are_refused():
  with pytest.raises(ValueError, match='mesh.data=3 is no multiple of the 4'):
    mesh_lib.hybrid(MeshConfig(3, 8, across=('data',)), gpus(4, 6))
  with pytest.raises(ValueError, match='names an axis twice'):
    MeshConfig(across=('data', 'data'))
  odd = gpus(2, 4)[:7]
  with pytest.raises(ValueError, match=r'as many devices .* \{0: 4, 1: 3\}'):
    mesh_lib.hybrid(MeshConfig(across=('fsdp',)), odd)


def test_a_mesh_of_real_devices_with_one_host_is_a_plain_one():
  config = MeshConfig(2, 2, 2)
  across = MeshConfig(2, 2, 2, across=('data', 'fsdp'))
  assert mesh_lib.make_mesh(across) == mesh_lib.make_mesh(config)
