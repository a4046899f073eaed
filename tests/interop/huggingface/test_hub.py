# SPDX-License-Identifier: Apache-2.0
import sys

import huggingface_hub
import pytest

from tests.interop import checkpoints
from tritera_jax.interop.huggingface import hub


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
  asked = []
  folder = tmp_path / 'snapshots/4e1243b'  # a commit

  def download(repo, *, revision, allow_patterns):
    asked.append((repo, revision, allow_patterns))
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert hub.local('hf://owner/name') == folder
  small = [
    'config.json', 'tokenizer.json', 'model.safetensors.index.json',
    'generation_config.json', 'tokenizer_config.json',
    'special_tokens_map.json', 'chat_template.jinja',
  ]  # fmt: skip
  assert asked == [
    ('owner/name', None, small),
    ('owner/name', '4e1243b', ['model.safetensors']),
  ]
  checkpoints.write(folder, {}, checkpoints.tensors('llama'), shards=2)
  hub.local('hf://owner/name@refs/pr/1')
  assert asked[2:] == [
    ('owner/name', 'refs/pr/1', small),
    (
      'owner/name',
      '4e1243b',
      ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'],
    ),
  ]


def test_a_hub_out_of_reach_says_so(monkeypatch):
  def download(*_, **__):
    raise ConnectionError('no route to host')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  with pytest.raises(OSError, match='hf://a/b cannot be fetched: .*no route'):
    hub.local('hf://a/b')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(ValueError, match="pip install 'tritera_jax.hub.'"):
    hub.local('hf://a/b')


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'x.gguf').touch()
  for name, file in (
    ('run', 'experiment.json'),
    ('packed', 'model.safetensors'),
    ('out.tritera-partial', 'config.json'),
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / file).touch()
  for source, words in {
    'x.gguf': 'x.gguf is a file, .*; import what a GGUF file was made of',
    'run': 'run is a run already',
    'packed': 'packed has model.safetensors and no config.json',
    'out.tritera-partial': 'left by a command that was interrupted',
    'owner/name': 'of the hub it is called hf://owner/name$',
    '/no/folder': 'config.json and safetensors$',
  }.items():
    with pytest.raises((ValueError, FileNotFoundError), match=words):
      hub.local(source)


@pytest.mark.parametrize(
  'name', ['hf://a', 'hf://a/b/c', 'hf://a/b@', 'hf:///']
)
def test_other_names_are_refused(name):
  with pytest.raises(ValueError, match='wanted hf://owner/name'):
    hub.local(name)
