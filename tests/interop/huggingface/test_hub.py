# SPDX-License-Identifier: Apache-2.0
import sys

import huggingface_hub
import pytest

from tests.interop import checkpoints
from tritera_jax.interop.huggingface import hub


def test_only_what_is_needed_is_fetched(tmp_path, monkeypatch):
  asked = []

  def download(repo, *, revision, allow_patterns):
    asked.append((repo, revision, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  assert hub.local('hf://owner/name') == tmp_path
  small = ['config.json', 'tokenizer.json', 'model.safetensors.index.json']
  assert asked == [
    ('owner/name', None, small),
    ('owner/name', None, ['model.safetensors']),
  ]
  checkpoints.write(tmp_path, {}, checkpoints.tensors('llama'), shards=2)
  hub.local('hf://owner/name@refs/pr/1')
  assert asked[2:] == [
    ('owner/name', 'refs/pr/1', small),
    (
      'owner/name',
      'refs/pr/1',
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


@pytest.mark.parametrize(
  'name', ['hf://a', 'hf://a/b/c', 'hf://a/b@', 'hf:///']
)
def test_other_names_are_refused(name):
  with pytest.raises(ValueError, match='wanted hf://owner/name'):
    hub.local(name)
