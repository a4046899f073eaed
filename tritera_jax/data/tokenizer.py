# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE: training one, loading one, telling two apart."""

from collections.abc import Iterable
import hashlib
import json
from pathlib import Path
from typing import Literal, get_args

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tritera_jax.data import storage

END_OF_TEXT = '<|endoftext|>'
# Llama 3's, and that of sentencepiece's models.
_OTHER_ENDS = ('<|end_of_text|>', '</s>')
# Beside a tokenizer.json whose document end has none of these names.
END_FILE = 'end_of_text.json'

# Where a token may not cross: a line end with the indentation that follows it
# is one piece, so that code's most frequent string is one token.
CODE_PIECES = (
  r'\s*\n[ \t]*'
  r'| ?[\p{L}_]+'
  r'| ?\p{N}{1,3}'
  r'| ?[^\s\p{L}_\p{N}]+'
  r'|\s+'
)
# Those of GPT-2 and of Llama 3, by which llama.cpp, too, can cut text.
GPT_2_PIECES = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r'|\s+(?!\S)|\s+'
)
LLAMA_3_PIECES = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
Pieces = Literal['code', 'gpt-2', 'llama-3']
_PIECES: dict[Pieces, str] = {
  'code': CODE_PIECES,
  'gpt-2': GPT_2_PIECES,
  'llama-3': LLAMA_3_PIECES,
}


def train_tokenizer(
  texts: Iterable[str], vocab_size: int, pieces: Pieces = 'code'
) -> tokenizers.Tokenizer:
  """A byte-level BPE tokenizer; END_OF_TEXT is id 0, bytes follow.

  Any string encodes and decodes without loss. The same texts in the same
  order give the same tokenizer. Short texts give fewer than `vocab_size`
  tokens.

  Args:
    texts: what to learn from.
    vocab_size: most tokens.
    pieces: where a token may not cross: as suits code, or as GPT-2 or Llama 3
      have it, which llama.cpp knows.

  Raises:
    ValueError: vocab_size does not hold the 256 bytes and END_OF_TEXT, or
      unknown pieces.
  """
  if pieces not in get_args(Pieces):
    raise ValueError(f'pieces={pieces!r} must be one of {get_args(Pieces)}')
  if vocab_size < 257:
    raise ValueError(
      f'vocab_size={vocab_size} must be at least 257: the bytes and '
      f'{END_OF_TEXT}'
    )
  # Llama 3 takes a piece that is a token as that token, and so does llama.cpp.
  model = (
    models.BPE(ignore_merges=True) if pieces == 'llama-3' else models.BPE()
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PIECES[pieces]), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.train_from_iterator(
    texts,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[END_OF_TEXT],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  return tokenizer


def load_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
  """Reads a Hugging Face tokenizer.json, from a folder or a bucket.

  Truncation and padding, which some of these files ask for, are turned off:
  they would drop text.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a tokenizer.
  """
  folder, _, name = str(path).rpartition('/')
  text = storage.read(folder or '.', name)
  if text is None:
    raise FileNotFoundError(f'no tokenizer at {path}')
  try:
    tokenizer = tokenizers.Tokenizer.from_str(text.decode())
  except Exception as error:  # the library raises bare Exception
    raise ValueError(f'{path} is not a tokenizer.json: {error}') from None
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def fingerprint(tokenizer: tokenizers.Tokenizer) -> str:
  """SHA-256 of the tokenizer's JSON, whitespace and key order apart."""
  canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()


def end_of_text_id(
  tokenizer: tokenizers.Tokenizer, folder: str | Path | None = None
) -> int:
  """The id that ends a document.

  Args:
    tokenizer: whose.
    folder: where its tokenizer.json lies. What END_FILE there says, or the
      eos_token_id of a config.json, goes before the names that are known.

  Raises:
    ValueError: nothing says so, or what does is malformed.
  """
  stated = None if folder is None else _stated_end(tokenizer, folder)
  end = _named_end(tokenizer) if stated is None else stated
  if end is None:
    raise ValueError(
      f'the tokenizer has no {END_OF_TEXT} token, nor '
      f'{" or ".join(_OTHER_ENDS)}; write which token ends a document to '
      f'{"" if folder is None else f"{folder}/"}{END_FILE}, beside '
      'tokenizer.json: {"id": NUMBER}'
    )
  return end


def record_end(folder: str | Path, tokenizer: tokenizers.Tokenizer, end: int):
  """Writes beside a tokenizer.json which token ends a document.

  Nothing, where its name says so.
  """
  if end != _named_end(tokenizer):
    storage.write(folder, END_FILE, json.dumps({'id': end}).encode())


def _named_end(tokenizer: tokenizers.Tokenizer) -> int | None:
  ids = map(tokenizer.token_to_id, (END_OF_TEXT, *_OTHER_ENDS))
  return next((id for id in ids if id is not None), None)


def _stated_end(
  tokenizer: tokenizers.Tokenizer, folder: str | Path
) -> int | None:
  """The first that is a token; a config.json may say null, or several."""
  for name, field in ((END_FILE, 'id'), ('config.json', 'eos_token_id')):
    text = storage.read(folder, name)
    if text is None:
      continue
    try:
      found = json.loads(text)[field]
    except KeyError:
      continue
    except (ValueError, TypeError) as error:
      raise ValueError(
        f'{folder}/{name} has no {field!r} of a token: {error}'
      ) from None
    for id in found if isinstance(found, list) else [found]:
      if type(id) is int and id >= 0 and tokenizer.id_to_token(id) is not None:
        return id
    if name == END_FILE:
      raise ValueError(f'{folder}/{name}: {field}={found!r} is no token')
  return None
