# SPDX-License-Identifier: Apache-2.0
"""Checkpoints named by hf://owner/name, through huggingface_hub."""

from pathlib import Path
import re

from tritera_jax.interop.huggingface import safetensors_file

SCHEME = 'hf://'
_NAME = re.compile(
  r'hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?', re.ASCII
)
_SMALL = ['config.json', 'tokenizer.json', safetensors_file.INDEX]


def local(source: str) -> Path:
  """The folder that `source` names, fetched if it is hf://owner/name@revision.

  Raises:
    ValueError: it is no such name, or huggingface_hub is missing.
    OSError: it cannot be fetched.
  """
  if not source.startswith(SCHEME):
    return Path(source)
  found = _NAME.fullmatch(source)
  if found is None:
    raise ValueError(
      f'{source} is no checkpoint; wanted hf://owner/name or '
      'hf://owner/name@revision'
    )
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f"{source} is fetched with huggingface_hub; pip install '"
      "tritera_jax[hub]', or name a folder that holds the checkpoint"
    ) from None

  def fetch(patterns: list[str]) -> Path:
    try:
      return Path(
        huggingface_hub.snapshot_download(
          found['repo'], revision=found['revision'], allow_patterns=patterns
        )
      )
    except Exception as error:  # of whatever the network is reached with
      raise OSError(
        f'{source} cannot be fetched: {type(error).__name__}: {error}; where '
        'the hub is out of reach, name a folder that holds the checkpoint'
      ) from error

  folder = fetch(_SMALL)
  index = folder / safetensors_file.INDEX
  shards = [safetensors_file.SINGLE]
  if index.is_file():
    shards = sorted({*safetensors_file.read_index(index).values()})
  return fetch(shards)
