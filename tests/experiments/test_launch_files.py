# SPDX-License-Identifier: Apache-2.0
"""The sample launch files, run to the line before training.

Stand-ins for srun, gcloud and xpk run what they are given; `tritera train`
gets --dry-run and the environment that the scheduler would set.
"""

import os
from pathlib import Path
import re
import subprocess

from jax._src.clusters import cloud_tpu_cluster
import pytest
import yaml

from tritera_jax import cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / 'experiments' / 'launch'
STANDS_IN = {
  'srun': 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
  'gcloud': 'shift $(($# - 1)); exec bash -euc "$1"',
  'xpk': 'shift $(($# - 1)); exec bash -euc "$1"',
  'tritera': 'printf "%s\\n" "$@" > "$RECORD"',
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """A function that gives what `tritera` says to arguments and variables."""
  monkeypatch.chdir(ROOT)
  for name in list(os.environ):
    # libtpu, where an earlier test has loaded it, leaves variables of its own.
    if name.startswith(
      ('SLURM_', 'OMPI_', 'KUBERNETES_', 'JAX_COORD', 'CUDA', 'TPU_')
    ):
      monkeypatch.delenv(name)

  def dry_run(arguments, **variables):
    with monkeypatch.context() as patch:
      for name, value in variables.items():
        patch.setenv(name, str(value))
      code = cli.main([*arguments, '--dry-run'])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out.strip()

  return dry_run


def arguments_in(script: str, folder: Path) -> list[str]:
  """What a script calls `tritera` with."""
  commands = folder / 'bin'
  pod = folder / 'tritera_jax' / '.venv' / 'bin'
  for place in (commands, pod):
    place.mkdir(parents=True)
    for name, body in STANDS_IN.items():
      (place / name).write_text(f'#!/bin/bash\n{body}\n')
      (place / name).chmod(0o755)
  record = folder / 'record'
  variables = {
    'DATASET': 'gs://b/data', 'RUN': '/mnt/runs/new run', 'IMAGE': 'i',
    'CLUSTER': 'c', 'POD': 'p', 'ZONE': 'z', 'RECORD': str(record),
    'PATH': f'{commands}:{os.environ["PATH"]}',
  }  # fmt: skip
  if 'sbatch' not in script:
    variables['RUN'] = '/mnt/runs/new'  # it passes through two shells
  subprocess.run(
    ['bash', FOLDER / script], cwd=folder, env=variables, check=True
  )
  return record.read_text().splitlines()


@pytest.mark.parametrize(
  'script, task, words',
  [
    ('slurm_process_per_gpu.sbatch', 31, 'process 31 of 32 by SLURM, '
     'coordinator n01:62055, takes GPU 7'),
    ('slurm_process_per_node.sbatch', 3, 'process 3 of 4 by SLURM, '
     'coordinator n01:62055'),
  ],
)  # fmt: skip
def test_slurm(run, tmp_path, script, task, words):
  asked = dict(
    re.findall(r'^#SBATCH --([\w-]+)=(\d+)$', (FOLDER / script).read_text(),
               re.MULTILINE)
  )  # fmt: skip
  nodes, each = int(asked['nodes']), int(asked['ntasks-per-node'])
  gpus = int(asked['gpus-per-node'])
  said = run(
    arguments_in(script, tmp_path),
    SLURM_JOB_ID=4711,
    SLURM_STEP_NODELIST='n[01-04]',
    SLURM_STEP_NUM_NODES=nodes,
    SLURM_NTASKS=nodes * each,
    SLURM_PROCID=task,
    SLURM_LOCALID=task % each,
    SLURM_GPUS_ON_NODE=gpus,
    CUDA_VISIBLE_DEVICES=','.join(map(str, range(gpus))),
  )
  assert said == f'{words}; 32 devices, mesh data=4 fsdp=8 context=1 tensor=1'


@pytest.mark.parametrize(
  'code, again', [(0, 0), (1, 0), (2, 0), (75, 1), (143, 1)]
)
def test_slurm_starts_a_run_again_that_would_go_on(tmp_path, code, again):
  for script in ('slurm_process_per_gpu', 'slurm_process_per_node'):
    commands = tmp_path / script
    commands.mkdir()
    record = commands / 'record'
    for name, body in (
      ('srun', f'exit {code}'), ('scontrol', f'echo "$@" >> {record}'),
    ):  # fmt: skip
      (commands / name).write_text(f'#!/bin/bash\n{body}\n')
      (commands / name).chmod(0o755)
    done = subprocess.run(
      ['bash', FOLDER / f'{script}.sbatch'],
      env={
        'DATASET': 'd', 'RUN': 'r', 'SLURM_JOB_ID': '47',
        'PATH': f'{commands}:{os.environ["PATH"]}',
      },
    )  # fmt: skip
    assert done.returncode == code
    said = record.read_text() if record.exists() else ''
    assert said == again * 'requeue 47\n'


def container(file: str):
  """Parallelism and the container of a JobSet's only job, and how many."""
  jobset = yaml.safe_load((FOLDER / file).read_text())
  (job,) = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  assert spec['parallelism'] == spec['completions']
  (one,) = spec['template']['spec']['containers']
  # JobSet names pods JOBSET-JOB-REPLICA-POD, in the subdomain JOBSET.
  name = jobset['metadata']['name']
  assert jobset['spec']['failurePolicy']['rules'] == [
    {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
  ]
  [rule] = spec['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  assert rule['onExitCodes'] == {'operator': 'In', 'values': [1, 2]}
  return f'{name}-{job["name"]}', name, job['replicas'], spec, one


@pytest.fixture
def on_a_tpu(monkeypatch):
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(
    cloud_tpu_cluster.socket, 'gethostbyname', lambda name: '10.0.0.1'
  )


def test_gke_tpus(run, on_a_tpu):
  job, domain, slices, spec, one = container('gke_tpu_jobset.yaml')
  hosts = spec['parallelism']
  chips = one['resources']['limits']['google.com/tpu']
  topology = spec['template']['spec']['nodeSelector'][
    'cloud.google.com/gke-tpu-topology'
  ]
  x, y = map(int, topology.split('x'))
  assert hosts * chips == x * y
  variables = {v['name']: v.get('value', slices - 1) for v in one['env']}
  said = run(
    one['command'][1:],
    **variables,
    TPU_WORKER_ID=hosts - 1,
    TPU_WORKER_HOSTNAMES=','.join(
      f'{job}-{slices - 1}-{n}.{domain}' for n in range(hosts)
    ),
  )
  assert said == (
    'process 127 of 128 by a TPU pod of GKE, coordinator '
    f'{job}-0-0.{domain}:8482; 512 devices, '
    'mesh data=2 fsdp=256 context=1 tensor=1'
  )


def test_gke_gpus(run):
  job, domain, _, spec, one = container('gke_gpu_jobset.yaml')
  assert spec['completionMode'] == 'Indexed'  # sets JOB_COMPLETION_INDEX
  command = [a.replace('$(JOB_COMPLETION_INDEX)', '2') for a in one['command']]
  assert run(command[1:]) == (
    f'process 2 of 4 by flags, coordinator {job}-0-0.{domain}:8476; '
    '32 devices, mesh data=4 fsdp=8 context=1 tensor=1'
  )


def test_xpk(run, on_a_tpu, tmp_path):
  said = run(
    arguments_in('xpk.sh', tmp_path),
    MEGASCALE_NUM_SLICES=2,
    MEGASCALE_SLICE_ID=1,
    MEGASCALE_COORDINATOR_ADDRESS='trilm-slice-job-0-0.trilm',
    TPU_WORKER_ID=0,
    TPU_WORKER_HOSTNAMES=','.join(f'host{n}' for n in range(64)),
  )
  assert said.startswith('process 64 of 128 by a TPU pod of GKE, ')
  assert said.endswith('512 devices, mesh data=2 fsdp=256 context=1 tensor=1')


def test_a_tpu_pod(run, on_a_tpu, tmp_path, monkeypatch):
  metadata = {
    'agent-worker-number': '63',
    'worker-network-endpoints': ','.join(f'x:y:10.0.0.{n}' for n in range(64)),
    'tpu-env': "ZONE: 'z'\n",
  }
  monkeypatch.setattr(
    cloud_tpu_cluster, 'get_metadata', lambda key: (metadata[key], 200)
  )
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
  assert run(arguments_in('tpu_pod.sh', tmp_path)) == (
    'process 63 of 64 by a TPU pod, coordinator 10.0.0.0:8482; '
    '256 devices, mesh data=1 fsdp=256 context=1 tensor=1'
  )


def test_every_launch_file_is_tested():
  text = Path(__file__).read_text()
  for file in FOLDER.iterdir():
    if file.suffix != '.md':
      assert f"'{file.name}'" in text
