# SPDX-License-Identifier: Apache-2.0
"""What a user sees who hands in something bad, and that nothing is lost.

`python -m pytest tests/test_refusals.py -rP` prints every message.
"""

import hashlib
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from safetensors import numpy as safetensors
import tensorstore as ts

from tests.interop import checkpoints
from tritera_jax import cli
from tritera_jax.checkpoint import save
from tritera_jax.data import prepare

EXPERIMENT = """
from pathlib import Path
import re
from tests import tiny

def experiment():
  return tiny.experiment(Path({data!r}), Path({run!r}), 20)
"""


class Place:
  """A dataset, a finished run and an experiment file, of its own."""

  def __init__(self, folder: Path, data: Path, run: Path):
    self.folder = folder
    self.data = shutil.copytree(data, folder / 'data')
    self.run = shutil.copytree(run, folder / 'run')
    self.file = folder / 'experiment.py'
    self.file.write_text(
      EXPERIMENT.format(data=str(self.data), run=str(folder / 'new'))
    )

  @property
  def train(self) -> list[str]:
    return ['train', str(self.file)]

  def tokens(self) -> Path:
    return self.data / 'train' / '00000-000.tokens.zarr3'

  def bytes(self, file: Path, change):
    data = bytearray(file.read_bytes())
    file.unlink()
    file.write_bytes(change(data))

  def manifest(self, **shard):
    file = self.data / 'manifest.json'
    manifest = json.loads(file.read_text())
    manifest['splits']['train'][0].update(shard)
    file.write_text(json.dumps(manifest))

  def packed(self, format: str, **changes) -> list[str]:
    """Rewrites a packed file, and how to use it."""
    folder = self.run / 'packed' / format
    file = folder / 'model.safetensors'
    tensors = safetensors.load_file(file)
    header = json.loads(file.read_bytes()[8:][: _header_bytes(file)])
    metadata = header['__metadata__'] | changes.pop('metadata', {})
    for name, tensor in tensors.items():
      if name.endswith('mlp.up.packed') and 'byte' in changes:
        tensor = tensor.copy()
        tensor.flat[0] = changes['byte']
        tensors[name] = tensor
    file.unlink()
    safetensors.save_file(tensors, file, metadata)
    return ['generate', str(folder), '--prompt', 'x']


def _header_bytes(file: Path) -> int:
  return int.from_bytes(file.read_bytes()[:8], 'little')


@pytest.fixture
def place(tmp_path, tiny_data, tiny_run) -> Place:
  return Place(tmp_path, tiny_data, tiny_run)


def a_flipped_bit_in_a_shard(place):
  place.bytes(
    place.tokens() / 'c' / '0', lambda d: bytes([d[0] ^ 1]) + bytes(d[1:])
  )
  return place.train, 'the dataset is damaged: prepare again'


def a_truncated_shard(place):
  place.bytes(place.tokens() / 'c' / '0', lambda d: d[: len(d) // 2])
  return place.train, 'the dataset is damaged: prepare again'


def a_missing_shard(place):
  shutil.rmtree(place.tokens())
  return place.train, 'cannot be opened'


def a_manifest_and_a_shard_that_disagree(place):
  place.manifest(tokens=12_345)
  return place.train, r'the manifest says uint16\[12345\]; the dataset is dama'


def a_token_past_the_vocabulary(place):
  kvstore = {'driver': 'file', 'path': f'{place.tokens()}/'}
  array = ts.open({'driver': 'zarr3', 'kvstore': kvstore}).result()
  array.write(np.full(array.shape, 384, np.uint16)).result()
  return place.train, 'has id 384, past the vocabulary of 384'


def a_tokenizer_that_is_not_the_data_s(place):
  other = place.folder / 'other'
  prepare.prepare(
    str(Path(sysconfig.get_path('stdlib')) / 'email'), str(other),
    vocab_size=384, holdout=0.3,
  )  # fmt: skip
  return ['eval', str(place.run), '--data', str(other)], (
    r'the tokenizer of .*/run is .*, that of .*/other is .*: the ids of one'
  )


def a_tokenizer_exchanged_in_the_dataset(place):
  file = place.data / 'tokenizer.json'
  text = file.read_text()
  file.unlink()
  file.write_text(text.replace('"<|endoftext|>"', '"<|end|>"'))
  return place.train, r'tokenizer\.json is .*, the manifest says .* damaged'


def an_unknown_override(place):
  return [*place.train, '--model.scale-block', '2'], '--model.scale-blocks'


def a_batch_that_the_mesh_cannot_divide(place):
  return (
    [*place.train, '--data.batch-size', '6', '--mesh.tensor', '1',
     '--mesh.data', '4'],
    'data.batch_size=6 must be a multiple of',
  )  # fmt: skip


def a_sequence_that_the_mesh_cannot_split(place):
  mesh = '--mesh.data 1 --mesh.fsdp 1 --mesh.tensor 1 --mesh.context 8'
  return (
    [*place.train, *mesh.split(), '--data.sequence-length', '24'],
    'data.sequence_length=24 must be a multiple of 2 x mesh.context=8',
  )


def a_mesh_that_does_not_fit_the_devices(place):
  return [*place.train, '--mesh.tensor', '3'], 'devices, but there are 8'


def a_process_that_sees_too_many_devices(place):
  return (
    [*place.train, '--local-devices', '4'],
    r'process 0 sees 8 cpu device\(s\), not 4 as by --local-devices 4',
  )


def processes_that_nobody_numbers(place):
  return [*place.train, '--processes', '2'], '--process must be given too'


def an_axis_across_hosts_twice(place):
  return (
    [*place.train, '--mesh.across', 'data', 'data'], 'names an axis twice'
  )  # fmt: skip


def a_run_folder_that_cannot_be_written(place):
  (place.folder / 'file').write_text('')
  folder = str(place.folder / 'file' / 'run')
  return [*place.train, '--run.folder', folder], 'Not a directory'


def a_run_folder_of_another_experiment(place):
  return (
    [*place.train, '--run.folder', str(place.run), '--model.scale-blocks', '1'],
    'model.scale_blocks: 2 there, 1 here',
  )


def new_weights_for_what_is_trained(place):
  data = str(place.data)
  return (
    [*place.train, '--run.folder', str(place.run), '--data.mixture', data, '1',
     data, '1'],
    'batch 0 was drawn by other shares; .* in data.reweighted, from step 20',
  )  # fmt: skip


def other_tokens_under_the_run(place):
  place.manifest(sha256='0' * 64)
  return (
    [*place.train, '--run.folder', str(place.run)],
    '/data has other tokens than dataset 0 of the 20 batches',
  )


def another_architecture_in_the_checkpoint(place):
  record = place.run / 'experiment.json'
  text = record.read_text()
  record.unlink()
  record.write_text(
    text.replace('"rope_theta": 10000.0', '"rope_theta": 500.0')
  )
  return (
    ['eval', str(place.run)], 'model.rope_theta: 10000.0 there, 500.0 here'
  )  # fmt: skip


def a_vocabulary_of_another_size(place):
  return [*place.train, '--model.vocab-size', '500'], '--model.vocab-size 384'


def a_packed_file_of_an_unknown_layout(place):
  return (
    place.packed('two_bit', metadata={'layout_version': '9'}),
    'layout_version',
  )


def a_code_of_3_in_two_bit(place):
  return place.packed('two_bit', byte=0b11), r'data\[0, 0\]=3 is no byte'


def a_byte_that_no_five_trits_give(place):
  return place.packed('base_three', byte=1), r'data\[0, 0\]=1 is no byte'


def no_such_checkpoint(place):
  return (
    ['pack', str(place.run), '--step', '7'],
    r'no checkpoint of step 7; it has \[10, 20\]',
  )


def _import(place, kind, change, **fields) -> list[str]:
  """Arguments that import a changed checkpoint."""
  found = checkpoints.tensors(kind)
  change(found)
  source = checkpoints.write(
    place.folder / 'hf',
    {**checkpoints.KINDS[kind], **fields},
    found,
    shards=2,
    tokenizer=place.data / 'tokenizer.json',
  )
  return ['import', str(source), '--out', str(place.folder / 'imported')]


def a_weight_that_is_not_ternary(place):
  def change(found):
    found['model.layers.1.mlp.up_proj.weight'][2, 3] = 0.5

  return (
    _import(place, 'trilm_2', change),
    r'layers.1.mlp.up_proj.weight: .* 0.5 at \[2, 3\] is neither 0 nor',
  )


def a_checkpoint_without_one_of_its_files(place):
  arguments = _import(place, 'trilm', lambda found: None)
  (place.folder / 'hf' / 'model-00002-of-00002.safetensors').unlink()
  return arguments, 'model-00002-of-00002.safetensors is missing, and model'


def a_checkpoint_with_another_rope(place):
  scaling = {'rope_type': 'yarn', 'factor': 4.0}
  return (
    _import(place, 'llama', lambda found: None, rope_scaling=scaling),
    "rope_scaling=.*'yarn'.* only plain RoPE is",
  )


CASES = [
  a_flipped_bit_in_a_shard,
  a_truncated_shard,
  a_missing_shard,
  a_manifest_and_a_shard_that_disagree,
  a_token_past_the_vocabulary,
  a_tokenizer_that_is_not_the_data_s,
  a_tokenizer_exchanged_in_the_dataset,
  an_unknown_override,
  a_batch_that_the_mesh_cannot_divide,
  a_sequence_that_the_mesh_cannot_split,
  a_mesh_that_does_not_fit_the_devices,
  a_process_that_sees_too_many_devices,
  processes_that_nobody_numbers,
  an_axis_across_hosts_twice,
  a_run_folder_that_cannot_be_written,
  a_run_folder_of_another_experiment,
  new_weights_for_what_is_trained,
  other_tokens_under_the_run,
  another_architecture_in_the_checkpoint,
  a_vocabulary_of_another_size,
  a_packed_file_of_an_unknown_layout,
  a_code_of_3_in_two_bit,
  a_byte_that_no_five_trits_give,
  no_such_checkpoint,
  a_weight_that_is_not_ternary,
  a_checkpoint_without_one_of_its_files,
  a_checkpoint_with_another_rope,
]


def contents(folder: Path) -> dict[str, str]:
  return {
    str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in folder.rglob('*')
    if file.is_file()
    and not {'new', '__pycache__'} & set(file.relative_to(folder).parts)
  }


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.__name__)
def test_it_is_refused_in_clear_words(place, case, capsys):
  arguments, message = case(place)
  before = contents(place.folder)
  try:
    code = cli.main(arguments)
  except SystemExit as exit:
    code = exit.code
  said = capsys.readouterr().err
  print(said)
  assert code in (1, 2)
  assert 'Traceback' not in said
  assert re.search(message, said), said
  assert contents(place.folder) == before


def test_a_half_written_step_is_passed_over(place, capsys):
  half = place.run / 'checkpoints' / '30.orbax-checkpoint-tmp'
  shutil.copytree(place.run / 'checkpoints' / '20' / 'params', half / 'params')
  assert cli.main(['pack', str(place.run)]) == 0
  assert save.latest_step(place.run) == 20


FULL = """
import resource, signal, sys
from tritera_jax import cli
# A write past a megabyte fails, as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(place):
  # 5 MB of state, saved at step 10.
  arguments = [
    *place.train, '--model.d-model', '384', '--model.d-ff', '384',
    '--run.evaluate-every', '0',
  ]  # fmt: skip
  failed = subprocess.run(
    [sys.executable, '-c', FULL, *arguments], capture_output=True, text=True
  )
  print(failed.stderr)
  assert failed.returncode == 74
  # Among what Orbax's threads print.
  assert re.search(
    r'^tritera train: .* could not be written .* steps \[\] .*too large',
    failed.stderr,
    re.MULTILINE,
  )
  assert save.latest_step(place.folder / 'new') is None
  assert cli.main(arguments) == 0
  assert save.latest_step(place.folder / 'new') == 20
