# SPDX-License-Identifier: Apache-2.0
"""Many processes as one: which this is, what it must see, and the device map.

JAX knows how TPU pods, SLURM, Open MPI and Kubernetes number their processes.
Its public `jax.distributed.initialize` starts at once with what it finds; a
conflict has to be refused, and a dry run answered, before. So its clusters
are asked here, and it is told the result.
"""

import collections
from collections.abc import Callable, Iterable
import dataclasses
import os
import socket
import time
from typing import Literal

import jax
from jax._src import clusters  # no public name tells what was found
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig

_CLUSTERS = {
  'Open MPI': clusters.OmpiCluster,
  'SLURM': clusters.SlurmCluster,
  'a TPU pod of GKE': clusters.GkeTpuCluster,
  'a TPU pod': clusters.GceTpuCluster,
  'Kubernetes': clusters.K8sCluster,
}
_HOST_BYTES = 64


@dataclasses.dataclass(frozen=True)
class Launch:
  """How this process finds the others; what is not given, the cluster says.

  Attributes:
    coordinator: host:port of process 0, where all others can reach it.
    processes: how many there are.
    process: which of them this is, from 0.
    local_devices: what each must see; any other number is refused.
    cluster: 'auto' asks TPU pods, SLURM, Open MPI and Kubernetes; 'none' asks
      nobody: one process, or what is given here.
    connect_seconds: to wait for the other processes.
  """

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  local_devices: int | None = None
  cluster: Literal['auto', 'none'] = 'auto'
  connect_seconds: int = 300

  def __post_init__(self):
    for flag in ('processes', 'local_devices', 'connect_seconds'):
      value = getattr(self, flag)
      if value is not None and value < 1:
        raise ValueError(f'{_flag(flag)} {value} must be >= 1')
    host, _, port = (self.coordinator or 'host:1').rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise ValueError(
        f'--coordinator {self.coordinator} is not HOST:PORT; give the host of '
        'process 0 and a port that is free there, such as node0:8476'
      )
    _check_number(self.process, self.processes)


@dataclasses.dataclass(frozen=True)
class Place:
  """A process among others.

  Attributes:
    process: from 0.
    processes: 1 is alone, and then there is nobody to connect to.
    coordinator: host:port of process 0; None if alone.
    source: who said so.
    devices: which of the GPUs that it sees it takes; empty: all.
    local_devices: how many each process must see; None: not known.
    expected_by: who said that.
  """

  process: int = 0
  processes: int = 1
  coordinator: str | None = None
  source: str = 'no cluster'
  devices: tuple[int, ...] = ()
  local_devices: int | None = None
  expected_by: str = ''


def find(launch: Launch) -> Place:
  """The place of this process by flags and environment; connects nothing.

  Coordinator, processes and process together win over any cluster, a
  coordinator alone over that of the cluster. Where the others come from the
  cluster, a number that contradicts it is refused.

  Raises:
    ValueError: flags or environment are incomplete or contradict each other.
  """
  flags = {
    name: getattr(launch, name)
    for name in ('coordinator', 'processes', 'process')
  }
  missing = [_flag(name) for name, value in flags.items() if value is None]
  if not missing:
    place = Place(
      launch.process or 0, launch.processes or 1, launch.coordinator, 'flags'
    )
  else:
    place = _ask_cluster(launch) if launch.cluster == 'auto' else None
    if place is None and len(missing) < len(flags):
      raise ValueError(
        f'{", ".join(missing)} must be given too: '
        + ('--cluster is none' if launch.cluster == 'none' else
           'neither a TPU pod, SLURM, Open MPI nor Kubernetes is here to say')
      )  # fmt: skip
    place = place or Place()
  if launch.local_devices is not None:
    place = dataclasses.replace(
      place,
      local_devices=launch.local_devices,
      expected_by=f'--local-devices {launch.local_devices}',
    )
  return place


def _flag(name: str) -> str:
  return f'--{name.replace("_", "-")}'


def _check_number(process: int | None, processes: int | None):
  if process is not None and not 0 <= process < (processes or process + 1):
    raise ValueError(
      f'--process {process} must lie in 0..{(processes or 1) - 1}, for '
      f'--processes {processes}'
    )


def _ask_cluster(launch: Launch) -> Place | None:
  _check_slurm_step()
  found = next((n for n, c in _CLUSTERS.items() if c.is_env_present()), None)
  if found is None:
    return None
  cluster = _CLUSTERS[found]
  try:
    process, processes = cluster.get_process_id(), cluster.get_process_count()
    coordinator = launch.coordinator
    if coordinator is None and processes > 1:
      coordinator = os.environ.get(
        'JAX_COORDINATOR_ADDRESS'
      ) or cluster.get_coordinator_address(
        timeout_secs=launch.connect_seconds,
        override_coordinator_port=os.environ.get('JAX_COORDINATOR_PORT'),
      )
  except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
    raise ValueError(
      f'{found} is here, but does not say how processes are numbered '
      f'({error}); give --coordinator, --processes and --process, or '
      '--cluster none for one process alone'
    ) from error
  for name, there in (('processes', processes), ('process', process)):
    here = getattr(launch, name)
    if here is not None and here != there:
      raise ValueError(
        f'{_flag(name)} {here}, but {found} says {there}; leave it out, or '
        'give --coordinator, --processes and --process, which win over it'
      )
  devices, expected, by = (), None, ''
  if found == 'SLURM':
    devices, expected, by = _slurm_devices(processes)
  elif (local := cluster.get_local_process_id()) is not None and processes > 1:
    devices, expected, by = (local,), 1, f'{found}, a process for each GPU'
  return Place(process, processes, coordinator, found, devices, expected, by)


def _check_slurm_step():
  """Refuses a batch script that asked for tasks and forgot srun."""
  tasks = int(os.environ.get('SLURM_NTASKS', 1))
  if tasks > 1 and 'SLURM_STEP_NODELIST' not in os.environ:
    raise ValueError(
      f'SLURM_NTASKS={tasks}, but this is no step of the job: only one process '
      'would run; start it with srun, or give --cluster none'
    )


def _slurm_devices(tasks: int) -> tuple[tuple[int, ...], int | None, str]:
  """Which GPUs a task takes, how many those are, and why.

  JAX would give each task the GPU of its local number: seven of eight stay
  idle with a task for each node, and with --gpus-per-task, where a task sees
  its own only, that number does not exist.
  """
  nodes = int(os.environ.get('SLURM_STEP_NUM_NODES', 1))
  if tasks % nodes:
    raise ValueError(
      f'SLURM_NTASKS={tasks} on SLURM_STEP_NUM_NODES={nodes}: each node must '
      'have as many tasks; set --ntasks-per-node'
    )
  here = tasks // nodes
  number = int(os.environ['SLURM_LOCALID'])
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if not visible:
    return (() if here == 1 else (number,)), None, ''
  gpus = len(visible.split(','))
  by = f'CUDA_VISIBLE_DEVICES={visible} and {here} tasks a node'
  on_node = int(os.environ.get('SLURM_GPUS_ON_NODE', gpus))
  if here == 1 or gpus == 1 or gpus < on_node:  # all that it sees is its own
    return (), gpus, by
  if gpus % here:
    raise ValueError(
      f'{by}: {gpus} GPUs cannot be shared by {here} tasks; set '
      f'--ntasks-per-node to 1 or {gpus}'
    )
  share = gpus // here
  return tuple(range(number * share, (number + 1) * share)), share, by


def start(launch: Launch) -> Place:
  """Finds the place of this process and connects it to the others.

  Nothing may have used a device before.

  Raises:
    ValueError: see `find`.
    OSError: the others could not be reached.
  """
  place = find(launch)
  if place.processes == 1:
    return place
  if place.process != 0:
    _await(place, launch.connect_seconds)
  # It would take SIGTERM until the training loop does, and keep it.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      place.coordinator,
      place.processes,
      place.process,
      # None leaves JAX_LOCAL_DEVICE_IDS its say.
      list(place.devices) or None,
      cluster_detection_method='deactivate',
      initialization_timeout=launch.connect_seconds,
    )
  except RuntimeError as error:
    raise OSError(
      f'process {place.process} of {place.processes} (by {place.source}) did '
      f'not meet the others at {place.coordinator}: {error}'
    ) from error
  return place


def _await(place: Place, seconds: int):
  """Waits for process 0: jaxlib's own wait ends in an abort without words."""
  host, _, port = (place.coordinator or '').rpartition(':')
  address = host.strip('[]'), int(port)
  end = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection(address, timeout=seconds).close()
      return
    except OSError as error:
      if time.monotonic() > end:
        raise OSError(
          f'process {place.process} of {place.processes} (by {place.source}) '
          f'did not reach process 0 at {place.coordinator} in {seconds} s '
          f'({error}); see whether that process started, and give a '
          '--coordinator HOST:PORT that is open from here'
        ) from error
      time.sleep(0.2)


def check_devices(place: Place, mesh: MeshConfig):
  """Refuses devices that are not those of the launch, in every process alike.

  Raises:
    ValueError: a process sees an unexpected number of devices, or all of them
      do not make up the mesh.
  """
  counts = collections.Counter(d.process_index for d in jax.devices())
  kind = jax.devices()[0].device_kind
  if jax.process_count() != place.processes:
    raise ValueError(
      f'{place.source} has {place.processes} processes, but the devices '
      f'({kind}) belong to {jax.process_count()}; start one process for each '
      'host of the pod'
    )
  # On CPUs, whose number is free, what was said of GPUs says nothing.
  on_cpu = jax.default_backend() == 'cpu' and jax.config.jax_platforms == 'cpu'
  wanted, by = place.local_devices, place.expected_by
  if wanted is None or (on_cpu and not by.startswith('--')):
    usual = collections.Counter(counts.values()).most_common(1)
    wanted, by = usual[0][0], 'most of the others'
  odd = {p: n for p, n in sorted(counts.items()) if n != wanted}
  if odd:
    seen = ', '.join(f'process {p} sees {n}' for p, n in list(odd.items())[:8])
    raise ValueError(
      f'{seen} {kind} device(s), not {wanted} as by {by}; set --local-devices, '
      'CUDA_VISIBLE_DEVICES or the tasks a node, or install the JAX of this '
      'accelerator (tritera doctor)'
    )
  mesh_lib.axis_sizes(mesh, jax.device_count())


def plan(place: Place, mesh: MeshConfig) -> tuple[str, dict[str, int] | None]:
  """What `start` would do, in words, and the mesh's axis sizes, if known.

  Raises:
    ValueError: the mesh does not fit the devices that are expected.
  """
  words = f'process {place.process} of {place.processes} by {place.source}'
  if place.coordinator:
    words += f', coordinator {place.coordinator}'
  if place.devices:
    words += f', takes GPU {", ".join(map(str, place.devices))}'
  if place.local_devices is None:
    return f'{words}; --local-devices N would check the mesh too', None
  total = place.processes * place.local_devices
  sizes = mesh_lib.axis_sizes(mesh, total)
  shape = ' '.join(f'{axis}={size}' for axis, size in sizes.items())
  return f'{words}; {total} devices, mesh {shape}', sizes


def device_map(config: MeshConfig) -> str:
  """A line for each process: its host, devices, kind and mesh coordinates.

  All processes must call it: they tell their hosts.

  Raises:
    ValueError: see `mesh.make_mesh`.
  """
  return table(mesh_lib.make_mesh(config), _hosts())


def table(mesh: Mesh, hosts: list[str]) -> str:
  """The device map of a mesh whose processes run on these hosts."""
  rows = collections.defaultdict(list)
  for place, device in np.ndenumerate(mesh.devices):
    rows[device.process_index].append((device, place))
  shape = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  lines = [f'{mesh.size} devices of {len(rows)} processes, mesh {shape}']
  width = max(map(len, hosts))
  for process, cells in sorted(rows.items()):
    devices, places = zip(*cells, strict=True)
    kinds = ', '.join(sorted({device.device_kind for device in devices}))
    where = ' '.join(
      f'{axis}={_ranges(numbers)}'
      for axis, numbers in zip(
        mesh.axis_names, zip(*places, strict=True), strict=True
      )
    )
    lines.append(
      f'process {process:<4} {hosts[process]:<{width}}  '
      f'{len(devices)} x {kinds}  '
      f'ids {_ranges(device.id for device in devices)}  {where}'
    )
  return '\n'.join(lines)


def _ranges(numbers: Iterable[int]) -> str:
  """'0-3,8' of 0, 1, 2, 3, 8, in any order."""
  ranges: list[list[int]] = []
  for number in sorted(set(numbers)):
    if ranges and number == ranges[-1][1] + 1:
      ranges[-1][1] = number
    else:
      ranges.append([number, number])
  return ','.join(f'{a}-{b}' if b > a else f'{a}' for a, b in ranges)


def _hosts() -> list[str]:
  name = socket.gethostname()
  if jax.process_count() == 1:
    return [name]
  padded = name.encode()[:_HOST_BYTES].ljust(_HOST_BYTES, b'\0')
  names = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
  return [row.tobytes().rstrip(b'\0').decode() for row in np.asarray(names)]


def anywhere(flag: bool) -> bool:
  """Whether any process says so; all must ask."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def from_first(function: Callable[[], bytes]) -> bytes:
  """What `function` returns in process 0, in all: files may look otherwise
  to others for a while.

  Raises:
    ValueError: in the others, if it raised in process 0.
  """
  if jax.process_count() == 1:
    return function()
  found = b''

  def read():
    nonlocal found
    found = function()

  first_alone(read)
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(found))))
  padded = np.zeros(length, np.uint8)
  padded[: len(found)] = np.frombuffer(found, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def first_alone(action: Callable[[], object]):
  """Runs `action` in process 0, the others wait; all go on, or none.

  Raises:
    ValueError: in the others, if it raised in process 0.
  """
  if jax.process_count() == 1:
    action()
    return
  done = False
  try:
    if jax.process_index() == 0:
      action()
      done = True
  finally:
    done = bool(multihost_utils.broadcast_one_to_all(np.int32(done)))
  if not done:
    raise ValueError('process 0 refused; its own words say why')
