# SPDX-License-Identifier: Apache-2.0
"""Text to a tokenizer and token shards."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import hashlib
from pathlib import Path
import sysconfig
import time
import tokenize

import numpy as np
import tokenizers

from tritera_jax.data import shards
from tritera_jax.data import tokenizer as tokenizer_lib

STDLIB = 'stdlib'
# pydoc_data is one generated file of prose, a fourteenth of all the text: the
# split that it falls into would be mostly it.
_NOT_STDLIB = {
  'test', 'tests', 'idle_test', 'site-packages', 'dist-packages',
  'pydoc_data',
}  # fmt: skip
_ENCODED_AT_ONCE = 64  # documents


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a dataset holds; printed by the command line.

  Attributes:
    folder: of the dataset.
    manifest: its manifest.
    seconds: this call took: next to none if the dataset was there.
  """

  folder: str
  manifest: shards.Manifest
  seconds: float

  def __str__(self) -> str:
    lines = [f'{self.folder}: {self.manifest.vocab_size:,} tokens in the '
             f'vocabulary, {self.seconds:.1f} s']  # fmt: skip
    for split, entries in self.manifest.splits.items():
      documents, text, tokens = (
        sum(getattr(shard, field) for shard in entries)
        for field in ('documents', 'bytes', 'tokens')
      )
      lines.append(
        f'  {split:<10} {documents:,} documents, {text:,} bytes, '
        f'{tokens:,} tokens ({text / max(tokens, 1):.2f} bytes a token)'
      )
    return '\n'.join(lines)


def _stdlib_files() -> tuple[Path, list[Path]]:
  root = Path(sysconfig.get_path('stdlib'))
  files = (
    file.relative_to(root)
    for file in root.rglob('*.py')
    if not _NOT_STDLIB.intersection(file.relative_to(root).parts)
  )
  return root, sorted(files)


def _folder_files(corpus: Path) -> tuple[Path, list[Path]]:
  if corpus.is_file():
    return corpus.parent, [Path(corpus.name)]
  if not corpus.is_dir():
    raise FileNotFoundError(f'corpus {corpus} is neither a file nor a folder')
  files = (f.relative_to(corpus) for f in corpus.rglob('*') if f.is_file())
  return corpus, sorted(files)


def _read_text(file: Path) -> str | None:
  """A file's text, with '\\n' line ends; None if it does not decode.

  A .py file declares its encoding (PEP 263); an unknown one is a SyntaxError,
  one that is not of text (rot13) a LookupError. Half a surrogate pair is text
  to Python but not to UTF-8, in which bytes are counted.
  """
  try:
    if file.suffix == '.py':
      with tokenize.open(file) as source:
        text = source.read()
    else:
      text = file.read_text('utf-8')
    text.encode()
  except (UnicodeError, SyntaxError, LookupError):
    return None
  return text


def _held_out(name: str, fraction: float) -> bool:
  """By a hash of the name: adding files moves no other file."""
  digest = hashlib.sha256(name.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


def _encode(
  tokenizer: tokenizers.Tokenizer,
  texts: list[str],
  end_of_text: int,
  report: Callable[[int, int], None],
) -> Iterator[list[int]]:
  """Ids of each text and the end of text.

  The end-of-text token spelled out in a text is text: it must not end the
  document.
  """
  tokenizer.encode_special_tokens = True
  for start in range(0, len(texts), _ENCODED_AT_ONCE):
    for encoding in tokenizer.encode_batch_fast(
      texts[start : start + _ENCODED_AT_ONCE], add_special_tokens=False
    ):
      yield [*encoding.ids, end_of_text]
    report(min(start + _ENCODED_AT_ONCE, len(texts)), len(texts))


def prepare(
  corpus: str,
  out: str,
  *,
  vocab_size: int = 4096,
  tokenizer: str | None = None,
  holdout: float = 0.05,
  progress: Callable[[str, int, int], None] | None = None,
) -> Summary:
  """Writes a dataset of a train and a validation split.

  Run again with the same arguments it returns what is there.

  Args:
    corpus: a text file, a folder of them, or 'stdlib': the source text of the
      Python standard library, without tests and generated documentation.
      A file is a document.
    out: dataset folder to write.
    vocab_size: of the tokenizer that is trained, on the train split.
    tokenizer: a Hugging Face tokenizer.json to use instead of training one.
    holdout: share of files in the validation split, chosen by name.
    progress: called with what is being done, how much of it is done, and of
      how much: ('read', files, files), ('encode train', documents, documents).

  Raises:
    FileNotFoundError: there is no such corpus or tokenizer.
    ValueError: no text in a split, or `out` holds another dataset.
  """
  started = time.perf_counter()
  folder = Path(out)
  recipe = {'corpus': corpus, 'holdout': holdout}
  if tokenizer is None:
    recipe['vocab_size'] = vocab_size
  else:
    given = tokenizer_lib.load_tokenizer(tokenizer)
    recipe['tokenizer'] = tokenizer_lib.fingerprint(given)
  if (folder / 'manifest.json').exists():
    manifest = shards.read_manifest(folder)
    if manifest.recipe != recipe:
      raise ValueError(
        f'{out} holds a dataset made by {manifest.recipe}, not by {recipe}; '
        'choose another folder, or delete this one'
      )
    return Summary(out, manifest, time.perf_counter() - started)

  root, files = (
    _stdlib_files() if corpus == STDLIB else _folder_files(Path(corpus))
  )
  report = progress or (lambda *_: None)
  texts = {'train': [], 'validation': []}
  for i, file in enumerate(files, 1):
    report('read', i, len(files))
    text = _read_text(root / file)
    if text:
      held_out = _held_out(file.as_posix(), holdout)
      texts['validation' if held_out else 'train'].append(text)
  for split, documents in texts.items():
    if not documents:
      raise ValueError(
        f'corpus {corpus}: no text in the {split} split of {len(files)} '
        f'files; change holdout={holdout}, or give more files'
      )

  if tokenizer is None:
    given = tokenizer_lib.train_tokenizer(texts['train'], vocab_size)
  end_of_text = tokenizer_lib.end_of_text_id(given)
  # Not get_vocab_size(): a tokenizer of others may have holes in its ids.
  size = 1 + max(given.get_vocab().values())
  dtype = shards.token_dtype(size)
  folder.mkdir(parents=True, exist_ok=True)
  given.save(str(folder / 'tokenizer.json'))
  splits = {}
  for split, documents in texts.items():
    ids = list(
      _encode(
        given,
        documents,
        end_of_text,
        functools.partial(report, f'encode {split}'),
      )
    )
    splits[split] = [
      shards.write_shard(
        folder,
        f'{split}/00000',
        np.fromiter((i for document in ids for i in document), dtype),
        np.cumsum([len(document) for document in ids]),
        sum(len(document.encode()) for document in documents),
      )
    ]
  manifest = shards.Manifest(
    tokenizer=tokenizer_lib.fingerprint(given),
    vocab_size=size,
    end_of_text=end_of_text,
    dtype=dtype,
    splits=splits,
    recipe=recipe,
  )
  shards.write_manifest(folder, manifest)
  return Summary(out, manifest, time.perf_counter() - started)


def decode_split(dataset: str | Path, split: str) -> bytes:
  """The text of a split, documents end to end: what byte counts refer to."""
  source = shards.open_split(dataset, split)
  tokenizer = tokenizer_lib.load_tokenizer(Path(dataset) / 'tokenizer.json')
  ids = source.read(0, source.tokens)
  return tokenizer.decode(
    ids[ids != source.manifest.end_of_text].tolist(),
    skip_special_tokens=False,
  ).encode()
