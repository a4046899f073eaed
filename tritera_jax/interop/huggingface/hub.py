# SPDX-License-Identifier: Apache-2.0
"""Checkpoints named by hf://owner/name, through huggingface_hub."""

from pathlib import Path
import re

from tritera_jax.interop.huggingface import (
  kept,
  new_folder,
  safetensors_file,
)

SCHEME = 'hf://'
_NAME = re.compile(
  r'hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?', re.ASCII
)
_SMALL = ['config.json', 'tokenizer.json', safetensors_file.INDEX, *kept.FILES]


def local(source: str) -> Path:
  """The folder that `source` names, fetched if it is hf://owner/name@revision.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: it is no such name, or no checkpoint, or huggingface_hub is
      missing.
    OSError: it cannot be fetched.
  """
  if not source.startswith(SCHEME):
    return _checked(Path(source))
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

  def fetch(patterns: list[str], revision: str | None) -> Path:
    try:
      return Path(
        huggingface_hub.snapshot_download(
          found['repo'], revision=revision, allow_patterns=patterns
        )
      )
    except Exception as error:  # of whatever the network is reached with
      raise OSError(
        f'{source} cannot be fetched: {type(error).__name__}: {error}; where '
        'the hub is out of reach, name a folder that holds the checkpoint'
      ) from error

  folder = fetch(_SMALL, found['revision'])
  index = folder / safetensors_file.INDEX
  shards = [safetensors_file.SINGLE]
  if index.is_file():
    shards = sorted({*safetensors_file.read_index(index).values()})
  # Called by its commit: a branch may have moved since.
  return fetch(shards, folder.name)


def _checked(folder: Path) -> Path:
  """Refuses what is something else, as far as names tell."""
  new_folder.check_whole(folder)
  wanted = 'a checkpoint is a folder with config.json and safetensors'
  if folder.is_file():
    gguf = '; import what a GGUF file was made of' * (folder.suffix == '.gguf')
    raise ValueError(f'{folder} is a file, and {wanted}{gguf}')
  if not folder.exists():
    name = _NAME.fullmatch(f'{SCHEME}{folder}')
    hint = f'; of the hub it is called {SCHEME}{folder}' if name else ''
    raise FileNotFoundError(f'{folder} is not there; {wanted}{hint}')
  if (folder / 'config.json').is_file():
    return folder
  if (folder / 'experiment.json').is_file():
    raise ValueError(
      f'{folder} is a run already: other verbs take it as it is, and {wanted}'
    )
  if (folder / safetensors_file.SINGLE).is_file():
    raise ValueError(
      f'{folder} has {safetensors_file.SINGLE} and no config.json: fetch that '
      'too; or it is a packed folder, which cannot be imported: name what it '
      'was packed from'
    )
  return folder
