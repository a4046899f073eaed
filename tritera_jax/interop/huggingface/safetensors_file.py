# SPDX-License-Identifier: Apache-2.0
"""Tensors of safetensors files from outside, by name, one at a time.

The library checks a header's length, offsets and sizes. It takes the last of
two tensors of one name, and knows nothing of the index of several files
(`model.safetensors.index.json`): those checks are here.
"""

from collections.abc import Iterable, Mapping
import contextlib
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
import safetensors

from tritera_jax.interop.huggingface import json_file

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'U8': np.uint8,
  'I8': np.int8,
}
_MOST_AXES = 8
_POINTER = b'version https://git-lfs'


class Stored(NamedTuple):
  """A tensor in a file, by its header."""

  file: Path
  dtype: str
  shape: tuple[int, ...]


class TensorFiles:
  """One safetensors file, or a folder's: one, or several and their index.

  A context manager; files stay open inside.

  Attributes:
    path: of the file or folder.
    tensors: what is there, by name.
    metadata: of the single file's header, or of all of them together.
  """

  def __init__(self, path: str | Path):
    """Reads headers and checks them; no tensor yet.

    Raises:
      FileNotFoundError: neither a file nor a folder with one, or a file of
        the index is missing.
      ValueError: a header or the index is damaged or lies: file and tensor
        are named.
    """
    self.path = Path(path)
    self.tensors: dict[str, Stored] = {}
    self.metadata: dict[str, str] = {}
    self._opened: dict[Path, Any] = {}
    self._stack = contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
      self._open_all(self.path, stack)
      self._stack = stack.pop_all()

  def _open_all(self, path: Path, stack: contextlib.ExitStack):
    if not path.is_dir():
      self._open(path, stack)
    elif (path / SINGLE).is_file():
      index = path / INDEX
      if index.is_file() and {*read_index(index).values()} != {SINGLE}:
        raise ValueError(
          f'{path} has {SINGLE} and {INDEX}, which names other files; delete '
          'the one that is not of this checkpoint'
        )
      self._open(path / SINGLE, stack)
    elif (path / INDEX).is_file():
      placed = read_index(path / INDEX)
      for file in dict.fromkeys(placed.values()):
        if not (path / file).is_file():
          raise FileNotFoundError(
            f'{path / file} is missing, and {INDEX} names it; fetch it'
          )
        self._open(path / file, stack)
      self._check_index(path, placed)
    else:
      raise FileNotFoundError(
        f'{path} has neither {SINGLE} nor {INDEX}; other formats, such as '
        'pytorch_model.bin, have to be saved anew as safetensors'
      )

  def _open(self, file: Path, stack: contextlib.ExitStack):
    found = _read_header(file)
    try:
      opened = stack.enter_context(safetensors.safe_open(file, 'np'))
    except safetensors.SafetensorError as error:
      raise ValueError(
        f'{file} is not a whole safetensors file: {error}; fetch it again'
      ) from None
    for name, stored in found.items():
      if name in self.tensors:
        raise ValueError(
          f'tensor {name!r} is in {self.tensors[name].file} and in {file}'
        )
      self.tensors[name] = stored
    self.metadata |= opened.metadata() or {}
    self._opened[file] = opened

  def _check_index(self, folder: Path, placed: Mapping[str, str]):
    for name in sorted(placed.keys() | self.tensors.keys()):
      stored, file = self.tensors.get(name), placed.get(name)
      there = None if stored is None else stored.file.name
      if there != file:
        raise ValueError(
          f'{folder / INDEX}: tensor {name!r} is in {file or "no file"} by the '
          f'index, and in {there or "no file"}; fetch index and files again'
        )

  def __enter__(self) -> 'TensorFiles':
    return self

  def __exit__(self, *_):
    self._stack.close()

  def where(self, name: str) -> str:
    """A tensor's file and name, for errors."""
    return f'{self.tensors[name].file}: {name}'

  def rows(self, name: str, numbers: Iterable[int]) -> np.ndarray:
    """Some rows of a matrix; as `read`."""
    stored = self.tensors[name]
    try:
      found = self._opened[stored.file].get_slice(name)
      return np.concatenate([found[n : n + 1] for n in numbers])
    except safetensors.SafetensorError as error:
      raise ValueError(f'{stored.file}: tensor {name!r}: {error}') from None

  def read(self, name: str) -> np.ndarray:
    """A tensor, copied out of its file; BF16 as ml_dtypes' bfloat16.

    Raises:
      KeyError: there is none of this name.
      ValueError: its file cannot be read.
    """
    stored = self.tensors[name]
    try:
      return self._opened[stored.file].get_tensor(name)
    except safetensors.SafetensorError as error:
      raise ValueError(f'{stored.file}: tensor {name!r}: {error}') from None


def check_fetched(file: Path):
  """Refuses what Git LFS has in place of a file.

  Raises:
    ValueError: it is that.
  """
  with file.open('rb') as opened:
    if opened.read(len(_POINTER)) == _POINTER:
      raise ValueError(
        f'{file} is a pointer of Git LFS, and not the file; run `git lfs pull` '
        'in its repository'
      )


def _read_header(file: Path) -> dict[str, Stored]:
  """The tensors of a header, as far as the library does not check it."""
  check_fetched(file)
  with file.open('rb') as opened:
    start = opened.read(8)
    length = int.from_bytes(start, 'little')
    if len(start) < 8 or length > json_file.LONGEST:
      raise ValueError(
        f'{file} begins with {start.hex() or "nothing"}: no safetensors '
        f'header, or one of more than {json_file.LONGEST} bytes'
      )
    text = opened.read(length)
  if len(text) < length:
    raise ValueError(
      f'{file} is cut short: its header has {length} bytes, {len(text)} are '
      'there; fetch it again'
    )
  header = json_file.parse(text, f'{file}: its header')
  header.pop('__metadata__', None)
  return {name: _stored(file, name, told) for name, told in header.items()}


def _stored(file: Path, name: str, told: Any) -> Stored:
  def refuse(words: str) -> NoReturn:
    raise ValueError(f'{file}: tensor {name!r}: {words}: {repr(told)[:200]}')

  if not isinstance(told, dict):
    refuse('its header is no object')
  dtype, shape = told.get('dtype'), told.get('shape')
  if not isinstance(dtype, str) or dtype not in DTYPES:
    refuse(f'only the dtypes {", ".join(DTYPES)} are read')
  if (
    not isinstance(shape, list)
    or len(shape) > _MOST_AXES
    or any(type(n) is not int or not 0 < n < 2**48 for n in shape)
  ):
    refuse(f'shape must be a list of at most {_MOST_AXES} numbers above 0')
  return Stored(file, dtype, tuple(shape))


def read_index(file: Path) -> dict[str, str]:
  """Tensor name -> name of the file that it is in."""
  placed = json_file.read(file).get('weight_map')
  if not isinstance(placed, dict) or not placed:
    raise ValueError(f'{file} has no "weight_map" of tensors and their files')
  for name, shard in placed.items():
    if (
      not isinstance(shard, str)
      or not shard.endswith('.safetensors')
      or shard.startswith('.')
      or any(c in '/\\:' or not c.isprintable() for c in shard)
    ):
      raise ValueError(
        f'{file}: tensor {name!r} is in {shard!r}; wanted the name of a '
        'safetensors file beside it'
      )
  return placed
