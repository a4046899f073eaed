# SPDX-License-Identifier: Apache-2.0
"""Corpora as documents: which files there are, and the text in them.

By a file's ending: .jsonl and .json.gz-like files (plain, .gz or .zst) hold a
document a line, .parquet a document a row, any other file is one document.
"""

from collections.abc import Iterator
import functools
import hashlib
import importlib
import json
from pathlib import Path
import sysconfig
import tokenize
from typing import NamedTuple, TextIO
import zlib

STDLIB = 'stdlib'
# pydoc_data is one generated file of prose, a fourteenth of all the text: the
# split that it falls into would be mostly it.
_NOT_STDLIB = {
  'test', 'tests', 'idle_test', 'site-packages', 'dist-packages',
  'pydoc_data',
}  # fmt: skip
_LINES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.json.gz', '.json.zst')
_BLOCK = 2**20  # bytes read at once
# A longer text comes in several parts, cut at ends of lines: nothing of the
# size of a document needs to be in memory.
_PART = 2**20  # characters


class File(NamedTuple):
  """A file of a corpus: its name there, where it lies, its bytes."""

  name: str
  path: Path
  size: int


class Part(NamedTuple):
  """Some text of a document, in order.

  Attributes:
    document: its name: the file's, with ':<row>' where a file has several.
    text: empty for a document without text, or whose bytes are no text.
    ends: whether the document ends here.
    offset: bytes of the file that were read so far, about.
  """

  document: str
  text: str
  ends: bool
  offset: int


def files(corpus: str) -> list[File]:
  """The files of a corpus, sorted by name, without hidden and compiled ones.

  Args:
    corpus: a file, a folder, or 'stdlib': the source text of the Python
      standard library, without tests and generated documentation.

  Raises:
    FileNotFoundError: there is no such file or folder.
  """
  root = Path(corpus)
  if corpus == STDLIB:
    root = Path(sysconfig.get_path('stdlib'))
    names = (
      name
      for name in _below(root, '*.py')
      if not _NOT_STDLIB.intersection(name.parts)
    )
  elif root.is_file():
    root, names = root.parent, [Path(root.name)]
  elif root.is_dir():
    names = _below(root, '*')
  else:
    raise FileNotFoundError(f'corpus {corpus} is neither a file nor a folder')
  return [
    File(name.as_posix(), root / name, (root / name).stat().st_size)
    for name in sorted(names)
  ]


def _below(root: Path, pattern: str) -> Iterator[Path]:
  for file in root.rglob(pattern):
    name = file.relative_to(root)
    hidden = any(p.startswith('.') or p == '__pycache__' for p in name.parts)
    if file.is_file() and not hidden:
      yield name


def digest(listing: list[File]) -> str:
  """Tells corpora apart by the names and sizes of their files."""
  text = ''.join(f'{file.size} {file.name}\n' for file in listing)
  return hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()


def read(file: File, text_field: str = 'text') -> Iterator[Part]:
  """The documents of a file, in order.

  Args:
    file: of `files`.
    text_field: where a line's object or a row has its text.

  Raises:
    ValueError: a line or row is not as it should be, or the file is cut: the
      file, the line and what was wanted are named; or the extra for this kind
      of file is not installed.
  """
  if file.name.endswith(_LINES):
    rows = _json_rows(file, text_field)
  elif file.name.endswith('.parquet'):
    rows = _parquet_rows(file, text_field)
  else:
    yield from _text_file(file)
    return
  for row, (text, offset) in enumerate(rows):
    document = f'{file.name}:{row}'
    *before, last = _cut(text if _encodable(text) else '')
    for part in before:
      yield Part(document, part, False, offset)
    yield Part(document, last, True, offset)


def _encodable(text: str) -> bool:
  """Half a surrogate pair is text to Python and to JSON, but not to UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _cut(text: str) -> Iterator[str]:
  start = 0
  while len(text) - start > _PART:
    end = text.rfind('\n', start, start + _PART) + 1 or start + _PART
    yield text[start:end]
    start = end
  yield text[start:]


def _open_text(path: Path) -> TextIO:
  """With '\\n' line ends; a .py file declares its encoding (PEP 263).

  An unknown encoding is a SyntaxError, one that is not of text (rot13) a
  LookupError.
  """
  if path.suffix == '.py':
    return tokenize.open(path)
  return path.open(encoding='utf-8')


def _text_file(file: File) -> Iterator[Part]:
  try:
    with _open_text(file.path) as stream:
      # The whole file before its first part: half a document is none.
      for block in iter(functools.partial(stream.read, _BLOCK), ''):
        block.encode()
  except (UnicodeError, SyntaxError, LookupError):
    yield Part(file.name, '', True, file.size)
    return
  with _open_text(file.path) as stream:
    text = ''
    for block in iter(functools.partial(stream.read, _PART), ''):
      *before, text = _cut(text + block)
      for part in before:
        # On the underlying file: a text stream cannot tell while it is read.
        yield Part(file.name, part, False, stream.buffer.tell())
    yield Part(file.name, text, True, file.size)


def _json_rows(file: File, text_field: str) -> Iterator[tuple[str, int]]:
  for number, (line, offset) in enumerate(_lines(file), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line.decode())
      text = row[text_field]
    except ValueError as error:  # no JSON, or no UTF-8
      raise ValueError(f'{file.path}, line {number}: {error}') from None
    except (KeyError, TypeError, IndexError):
      has = sorted(row) if isinstance(row, dict) else type(row).__name__
      raise ValueError(
        f'{file.path}, line {number}: no field {text_field!r} in {has}; name '
        'the one that holds the text with --text-field'
      ) from None
    yield _checked(text, text_field, f'{file.path}, line {number}'), offset


def _checked(text, text_field: str, where: str) -> str:
  if text is None:
    return ''
  if not isinstance(text, str):
    raise ValueError(
      f'{where}: {text_field!r} is {type(text).__name__}, wanted text'
    )
  return text


def _lines(file: File) -> Iterator[tuple[bytes, int]]:
  rest, offset = b'', 0
  for block, offset in _blocks(file):
    *lines, rest = (rest + block).split(b'\n')
    for line in lines:
      yield line, offset
  yield rest, offset


def _blocks(file: File) -> Iterator[tuple[bytes, int]]:
  """Blocks of the file, decompressed, and the bytes of it read so far."""
  new = {'.gz': _gzip, '.zst': _zstandard}.get(file.path.suffix)
  with file.path.open('rb') as raw:
    blocks = iter(functools.partial(raw.read, _BLOCK), b'')
    if new is None:
      for block in blocks:
        yield block, raw.tell()
      return
    stream = new()
    started = False
    for block in blocks:
      while block:
        # A file may be several compressed ones, end to end.
        if stream.eof:
          stream = new()
        try:
          text = stream.decompress(block)
        except Exception as error:  # each library has its own
          raise ValueError(f'{file.path} is damaged: {error}') from None
        started = True
        yield text, raw.tell()
        block = stream.unused_data if stream.eof else b''
    if started and not stream.eof:
      raise ValueError(f'{file.path} is cut: its compressed data does not end')


def _gzip():
  return zlib.decompressobj(wbits=31)


def _zstandard():
  return _extra('zstandard', '.zst').ZstdDecompressor().decompressobj()


def _extra(module: str, ending: str):
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as error:
    raise ValueError(
      f'reading {ending} files needs {error.name}: pip install '
      "'tritera_jax[data]'"
    ) from None


def _parquet_rows(file: File, text_field: str) -> Iterator[tuple[str, int]]:
  parquet = _extra('pyarrow.parquet', '.parquet')
  try:
    with parquet.ParquetFile(file.path) as table:
      has = table.schema_arrow.names
      if text_field not in has:
        raise ValueError(
          f'no column {text_field!r} in {has}; name the one that holds the '
          'text with --text-field'
        )
      read, rows = 0, max(1, table.metadata.num_rows)
      for batch in table.iter_batches(batch_size=256, columns=[text_field]):
        read += len(batch)
        offset = file.size * read // rows
        for text in batch.column(0).to_pylist():
          yield _checked(text, text_field, 'a row'), offset
  except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors
    raise ValueError(f'{file.path}: {error}') from None
