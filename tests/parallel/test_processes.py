# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path
import re
import socket
import subprocess
import sys

import jax
import pytest

from tests.drills.lose_processes import free_port
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel import processes
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.parallel.processes import Launch, Place
from tritera_jax.train import metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(monkeypatch):
  """Sets variables where no cluster's own are."""
  for name in list(os.environ):
    if name.startswith(('SLURM_', 'OMPI_', 'KUBERNETES_', 'JAX_COORD', 'CUDA')):
      monkeypatch.delenv(name)

  def set_all(**variables):
    for name, value in variables.items():
      monkeypatch.setenv(name, str(value))

  return set_all


def slurm(*, tasks, nodes, task, **more):
  """What srun sets: see the section on output variables of its manual."""
  return {
    'SLURM_JOB_ID': 7, 'SLURM_STEP_NODELIST': 'gpu[07-09,12]',
    'SLURM_NTASKS': tasks, 'SLURM_STEP_NUM_NODES': nodes,
    'SLURM_PROCID': task, 'SLURM_LOCALID': task % (tasks // nodes), **more,
  }  # fmt: skip


EIGHT = '0,1,2,3,4,5,6,7'


@pytest.mark.parametrize(
  'tasks, nodes, more, devices, each',
  [
    # A task for each GPU; all of a node's are seen by all of its tasks.
    (32, 4, {'CUDA_VISIBLE_DEVICES': EIGHT}, (5,), 1),
    # --gpus-per-task=1: it sees its own as number 0.
    (32, 4, {'CUDA_VISIBLE_DEVICES': '5'}, (), 1),
    # --gpus-per-task=2.
    (16, 2, {'CUDA_VISIBLE_DEVICES': '2,3', 'SLURM_GPUS_ON_NODE': 16}, (), 2),
    # A task for each node takes them all, not the first alone.
    (4, 4, {'CUDA_VISIBLE_DEVICES': EIGHT}, (), 8),
    # Two tasks a node share.
    (4, 2, {'CUDA_VISIBLE_DEVICES': EIGHT}, (4, 5, 6, 7), 4),
    # No GPUs that SLURM would know of.
    (4, 4, {}, (), None),
  ],
)
def test_which_gpus_a_task_of_slurm_takes(
  environment, tasks, nodes, more, devices, each
):
  task = {32: 13, 16: 9}.get(tasks, tasks - 1)
  environment(**slurm(tasks=tasks, nodes=nodes, task=task, **more))
  place = processes.find(Launch())
  assert (place.process, place.processes) == (task, tasks)
  # jax: 61,440 and the job's number, modulo 4,096.
  assert place.coordinator == 'gpu07:61447'
  assert (place.devices, place.local_devices) == (devices, each)


def test_flags_win_and_what_is_left_out_is_asked_for(environment):
  assert processes.find(Launch()) == Place()
  given = Launch('node0:8476', 4, 3, local_devices=2)
  for variables in ({}, slurm(tasks=2, nodes=2, task=1)):
    environment(**variables)
    place = processes.find(given)
    assert (place.coordinator, place.processes) == ('node0:8476', 4)
    assert (place.process, place.local_devices) == (3, 2)
  place = processes.find(Launch('other:1'))
  assert (place.coordinator, place.processes) == ('other:1', 2)
  assert processes.find(Launch(cluster='none')) == Place()


@pytest.mark.parametrize(
  'launch, variables, words',
  [
    ({'coordinator': 'node0'}, {}, '--coordinator node0 is not HOST:PORT'),
    ({'coordinator': 'n:99999'}, {}, 'n:99999 is not HOST:PORT'),
    ({'processes': 0}, {}, '--processes 0 must be >= 1'),
    ({'processes': 4, 'process': 4}, {}, '--process 4 must lie in 0..3'),
    ({'processes': 4}, {}, '--coordinator, --process must be given too'),
    (
      {'coordinator': 'n:1', 'cluster': 'none'},
      slurm(tasks=2, nodes=2, task=0),
      '--processes, --process must be given too: --cluster is none',
    ),
    (
      {'processes': 4},
      slurm(tasks=8, nodes=2, task=0),
      '--processes 4, but SLURM says 8; leave it out, or give --coord',
    ),
    (
      {'process': 1},
      slurm(tasks=8, nodes=2, task=0),
      '--process 1, but SLURM says 0',
    ),
    ({}, {'SLURM_NTASKS': 8, 'SLURM_JOB_ID': 7}, 'start it with srun, or'),
    (
      {},
      slurm(tasks=3, nodes=1, task=0, CUDA_VISIBLE_DEVICES=EIGHT),
      '8 GPUs cannot be shared by 3 tasks; set --ntasks-per-node to 1 or 8',
    ),
    (
      {},
      slurm(tasks=4, nodes=4, task=0, SLURM_NTASKS=5),
      'SLURM_NTASKS=5 on SLURM_STEP_NUM_NODES=4: each node must have as many',
    ),
    (
      {},
      slurm(tasks=4, nodes=4, task=0, SLURM_JOB_ID='x'),
      'SLURM is here, but does not say .* --cluster none for one process',
    ),
  ],
)
def test_contradictions_are_refused(environment, launch, variables, words):
  environment(**variables)
  with pytest.raises(ValueError, match=words):
    processes.find(Launch(**launch))


def test_devices_that_are_not_those_of_the_launch_are_refused():
  mesh = MeshConfig(fsdp=8)
  processes.check_devices(Place(local_devices=8, expected_by='--l'), mesh)
  with pytest.raises(
    ValueError, match='process 0 sees 8 cpu .* not 1 as by --local-devices 1'
  ):
    processes.check_devices(
      Place(local_devices=1, expected_by='--local-devices 1'), mesh
    )
  with pytest.raises(ValueError, match='belong to 1; start one process for'):
    processes.check_devices(Place(processes=2), mesh)
  with pytest.raises(ValueError, match='takes 4 devices, but there are 8'):
    processes.check_devices(Place(), MeshConfig(fsdp=4))


def test_the_map_names_each_device_once():
  text = processes.table(
    mesh_lib.make_mesh(MeshConfig(2, 4), jax.devices()), ['node7']
  )
  head, line = text.splitlines()
  assert (
    head == '8 devices of 1 processes, mesh data=2 fsdp=4 context=1 tensor=1'
  )
  assert line.split() == [
    'process', '0', 'node7', '8', 'x', 'cpu', 'ids', '0-7',
    'data=0-1', 'fsdp=0-3', 'context=0', 'tensor=0',
  ]  # fmt: skip
  assert processes._ranges([9, 3, 1, 2, 9]) == '1-3,9'


def train(arguments, devices: int) -> subprocess.Popen:
  program = 'import sys; from tritera_jax import cli; sys.exit(cli.main())'
  return subprocess.Popen(
    [sys.executable, '-c', program, 'train', *map(str, arguments)],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
      '--xla_backend_optimization_level=0',  # compiles in half the time
      'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'kernels')]),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process: subprocess.Popen) -> str:
  try:
    out, err = process.communicate(timeout=120)
  finally:
    process.kill()
  return f'exit {process.returncode}\n{out}{err}'


@pytest.fixture
def file(tmp_path, tiny_data) -> Path:
  file = tmp_path / 'experiment.py'
  file.write_text(f"""
from pathlib import Path
from tests import tiny

def experiment():
  return tiny.experiment(Path({str(tiny_data)!r}), Path('nowhere'), 6)
""")
  return file


def by_process(port: int, process: int) -> list:
  return [
    '--coordinator', f'127.0.0.1:{port}', '--processes', 2,
    '--process', process, '--local-devices', 2,
  ]  # fmt: skip


def test_two_processes_train_as_one_does(file, tmp_path):
  port = free_port()
  mesh = '--mesh.data 2 --mesh.fsdp 2 --mesh.tensor 1 --mesh.across data'
  # Telemetry and held-out loss agree too, but take as long to compile.
  often = '--run.log-every 1 --run.evaluate-every 0 --run.telemetry-every 100'
  run = [file, *mesh.split(), *often.split()]
  # How weights travel between the devices makes no difference either.
  packed = ['--run.folder', tmp_path / 'two', '--run.gather', 'two_bit']
  two = [train([*run, *packed, *by_process(port, n)], 2) for n in range(2)]
  one = train([*run, '--run.folder', tmp_path / 'one'], 4)
  said = [finish(process) for process in (*two, one)]
  assert all(text.startswith('exit 0') for text in said), said

  records = metrics.read(tmp_path / 'two')
  wanted = metrics.read(tmp_path / 'one')
  assert [r['step'] for r in records] == [1, 2, 3, 4, 5, 6]
  for record, want in zip(records, wanted, strict=True):
    assert record['tokens_digest'] == want['tokens_digest']
    for name in ('loss', 'gradient_norm', 'parameter_norm'):
      assert record[name] == pytest.approx(want[name], rel=1e-6)

  line = r'^process (\d) +(\S+) +2 x cpu .* data=(\d)'
  host = socket.gethostname()
  assert re.findall(line, said[0], re.MULTILINE) == [
    ('0', host, '0'),
    ('1', host, '1'),
  ]
  assert 'process' not in said[1]  # it is said once


def test_a_process_with_too_few_devices_stops_both(file, tmp_path):
  port = free_port()
  started = [
    train([file, '--run.folder', tmp_path / 'x', *by_process(port, n)], 2 - n)
    for n in range(2)
  ]
  for said in map(finish, started):
    assert said.startswith('exit 1'), said
    assert 'process 1 sees 1 cpu device(s), not 2 as by --local-de' in said
  assert not (tmp_path / 'x').exists()


def test_a_coordinator_that_nobody_reaches_is_named(file):
  port = free_port()
  said = finish(train([file, *by_process(port, 1), '--connect-seconds', 1], 2))
  assert said.startswith('exit 1'), said
  assert f'did not reach process 0 at 127.0.0.1:{port}' in said
