# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is to be used: kept by an import, given back by an export.

Special tokens, settings of generation and the chat template mean nothing here:
the files stay as they came, in the run's folder `huggingface`. Ids are those of
the config.json that `importing` records.
"""

from pathlib import Path
import shutil
from typing import Any

from tritera_jax.data import tokenizer as tokenizer_lib

FILES = (
  'generation_config.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'chat_template.jinja',
)  # fmt: skip
_FOLDER = 'huggingface'
_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def keep(source: Path, run: Path):
  """Copies what is there of FILES, and does `keep_end`."""
  there = [source / name for name in FILES if (source / name).is_file()]
  for file in there:
    (run / _FOLDER).mkdir(exist_ok=True)
    shutil.copyfile(file, run / _FOLDER / file.name)
  keep_end(source, run)


def keep_end(source: Path, folder: Path):
  """Says which token ends a document, as a checkpoint's config.json does.

  Args:
    source: folder of the checkpoint.
    folder: of a run or a packed model, with its tokenizer.json.
  """
  tokenizer = tokenizer_lib.load_tokenizer(folder / 'tokenizer.json')
  try:
    end = tokenizer_lib.end_of_text_id(tokenizer, source)
  except ValueError:
    return  # who needs one is told
  tokenizer_lib.record_end(folder, tokenizer, end)


def give_back(run: Path, out: Path):
  """Copies what was kept over what is in `out`."""
  for name in FILES:
    if (run / _FOLDER / name).is_file():
      shutil.copyfile(run / _FOLDER / name, out / name)


def ids(config: dict[str, Any], end: int | None) -> dict[str, Any]:
  """The ids of special tokens for a config.json.

  Args:
    config: that of the checkpoint that was imported; {} of other runs.
    end: token that begins and ends documents, unless the config says more.
  """
  ends = dict.fromkeys(('bos_token_id', 'eos_token_id'), end)
  return ends | {name: config[name] for name in _IDS if name in config}
