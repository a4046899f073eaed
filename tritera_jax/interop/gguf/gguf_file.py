# SPDX-License-Identifier: Apache-2.0
"""Reads a GGUF file that may be damaged or hostile.

The format is ggml's (docs/gguf.md, versions 2 and 3), little-endian:

  'GGUF', version u32, number of tensors u64, number of keys u64,
  for each key: string, type u32, value,
  for each tensor: string, number of dimensions u32, each dimension u64, the
    innermost first, type u32, offset u64 from the data's start,
  padding to `general.alignment`, the data.

A string is its length as u64 and its bytes; an array is its elements' type as
u32, their number as u64, and they. Every count, length, type, offset and name
is checked before it is used, and what is allocated is at most a small multiple
of the header's bytes: tensors and arrays of numbers are views of the mapped
file, arrays of strings are decoded one by one when they are asked for.

What ggml itself refuses is refused: arrays of arrays, names of 64 bytes and
more, more than four dimensions, alignments that are no power of two.
"""

from array import array
from collections.abc import Sequence
import math
from pathlib import Path
import struct
from typing import Any, NamedTuple, NoReturn, overload

from jaxtyping import Float32, UInt8
import numpy as np

# ggml's types by number: name, weights a block, bytes a block (ggml.h and
# ggml-common.h of llama.cpp 01243c5).
TYPES: dict[int, tuple[str, int, int]] = {
  0: ('f32', 1, 4),
  1: ('f16', 1, 2),
  2: ('q4_0', 32, 18),
  3: ('q4_1', 32, 20),
  6: ('q5_0', 32, 22),
  7: ('q5_1', 32, 24),
  8: ('q8_0', 32, 34),
  10: ('q2_k', 256, 84),
  11: ('q3_k', 256, 110),
  12: ('q4_k', 256, 144),
  13: ('q5_k', 256, 176),
  14: ('q6_k', 256, 210),
  16: ('iq2_xxs', 256, 66),
  17: ('iq2_xs', 256, 74),
  18: ('iq3_xxs', 256, 98),
  19: ('iq1_s', 256, 50),
  20: ('iq4_nl', 32, 18),
  21: ('iq3_s', 256, 110),
  22: ('iq2_s', 256, 82),
  23: ('iq4_xs', 256, 136),
  24: ('i8', 1, 1),
  25: ('i16', 1, 2),
  26: ('i32', 1, 4),
  27: ('i64', 1, 8),
  28: ('f64', 1, 8),
  29: ('iq1_m', 256, 56),
  30: ('bf16', 1, 2),
  34: ('tq1_0', 256, 54),
  35: ('tq2_0', 256, 66),
  39: ('mxfp4', 32, 17),
  40: ('nvfp4', 64, 36),
  41: ('q1_0', 128, 18),
  42: ('q2_0', 64, 18),
}
TYPE_IDS = {name: id for id, (name, _, _) in TYPES.items()}

_SCALARS = {
  0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4',
  7: 'bool', 10: '<u8', 11: '<i8', 12: '<f8',
}  # fmt: skip
_STRING, _ARRAY = 8, 9

# Far above any model's, and low enough that a file of nothing but counts is
# read in less than a second.
MAX_KEYS, MAX_TENSORS, MAX_STRINGS, MAX_TEXT = 2**16, 2**16, 2**21, 2**24
_MAX_DIMENSIONS, _MAX_NAME, _MAX_ALIGNMENT = 4, 63, 2**20
_MAX_KEY = 2**16 - 1
_WHOLE = 2**63  # ggml's int64


class Tensor(NamedTuple):
  """Where a tensor lies. `shape` has the innermost dimension last."""

  name: str
  type: str
  shape: tuple[int, ...]
  offset: int
  nbytes: int


class Strings(Sequence):
  """An array of strings in a mapped file."""

  def __init__(self, data: memoryview, starts: array, where: str):
    self._data, self._starts, self._where = data, starts, where

  def __len__(self) -> int:
    return len(self._starts)

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> list[str]: ...
  def __getitem__(self, index: int | slice) -> str | list[str]:
    if isinstance(index, slice):
      return [self[i] for i in range(*index.indices(len(self)))]
    start = self._starts[index]
    (size,) = struct.unpack_from('<Q', self._data, start)
    try:
      return str(self._data[start + 8 : start + 8 + size], 'utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{self._where}[{index}] is not UTF-8: {error}') from (
        None
      )


class GgufFile:
  """A checked file.

  Attributes:
    path: of the file.
    version: 2 or 3.
    metadata: int, float, bool, str, NumPy arrays and `Strings` by key.
    tensors: by name, in the order of the file.
  """

  def __init__(self, path: Path, data: np.ndarray):
    reader = _Reader(path, data)
    self.path = path
    self.version = reader.version
    self.metadata: dict[str, Any] = reader.metadata
    self.tensors: dict[str, Tensor] = reader.tensors
    self._data = data

  def value(self, key: str, kind: type) -> Any:
    """The value of a key.

    Raises:
      ValueError: it is missing, or of another kind.
    """
    found = self.metadata.get(key)
    if type(found) is not kind:
      raise ValueError(
        f'{self.path}: {key} is '
        f'{"missing" if found is None else f"{found!r:.60}"}, wanted '
        f'{kind.__name__}'
      )
    return found

  def rows(self, name: str) -> UInt8[np.ndarray, 'rows bytes']:
    """A tensor's bytes, row by row: a view of the mapped file.

    Raises:
      ValueError: there is no such tensor.
    """
    if name not in self.tensors:
      raise ValueError(f'{self.path}: there is no tensor {name}')
    tensor = self.tensors[name]
    data = self._data[tensor.offset : tensor.offset + tensor.nbytes]
    return data.reshape(math.prod(tensor.shape[:-1]), -1)

  def floats(self, name: str) -> Float32[np.ndarray, '...']:
    """A tensor of f32, f16, bf16 or q8_0 as float32, in its shape.

    Raises:
      ValueError: there is no such tensor, or it is of another type.
    """
    data = self.rows(name)
    tensor = self.tensors[name]
    if tensor.type == 'f32':
      values = data.view('<f4')
    elif tensor.type == 'f16':
      values = data.view('<f2')
    elif tensor.type == 'bf16':
      values = (data.view('<u2').astype(np.uint32) << 16).view(np.float32)
    elif tensor.type == 'q8_0':
      # A block: float16 scale, 32 int8 (block_q8_0).
      blocks = data.reshape(-1, 34)
      scale = np.ascontiguousarray(blocks[:, :2]).view('<f2')
      values = blocks[:, 2:].view(np.int8) * scale.astype(np.float32)
    else:
      raise ValueError(
        f'{self.path}: tensor {name} is {tensor.type}; f32, f16, bf16 and q8_0 '
        'can be read as numbers'
      )
    return values.astype(np.float32).reshape(tensor.shape)


def read(path: str | Path) -> GgufFile:
  """Opens a GGUF file and checks all of its header.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no GGUF file, or one that is damaged: says where, what
      is there, and what would be right.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is no file')
  if path.stat().st_size < 24:
    raise ValueError(
      f'{path} has {path.stat().st_size} bytes; a GGUF file has 24 and more'
    )
  return GgufFile(path, np.memmap(path, np.uint8, 'r').view(np.ndarray))


class _Reader:
  """Goes through a header once."""

  def __init__(self, path: Path, data: np.ndarray):
    self.path, self.size = path, len(data)
    self.data = memoryview(data)
    self.at, self.strings, self.text = 0, 0, 0
    self.where = 'header'
    if bytes(self.data[:4]) != b'GGUF':
      self.refuse(f'begins with {bytes(self.data[:4])!r}, not with GGUF')
    self.at = 4
    self.version = self.number('I')
    if self.version not in (2, 3):
      swapped = int.from_bytes(self.version.to_bytes(4, 'little'), 'big')
      self.refuse(
        'is big-endian; convert it to little-endian'
        if swapped in (2, 3)
        else f'is of version {self.version}; 2 and 3 are read'
      )
    tensors, keys = self.number('Q'), self.number('Q')
    # A key is no shorter than 8 + 1 + 4 + 1 bytes, a tensor than 33.
    self.count('tensors', tensors, MAX_TENSORS, 33)
    self.count('keys', keys, MAX_KEYS, 14)
    self.metadata = {}
    for n in range(keys):
      self.key(n)
    alignment = self.alignment()
    found = [self.tensor(n) for n in range(tensors)]
    start = -(-self.at // alignment) * alignment
    self.tensors = self.placed(found, start, alignment)

  def refuse(self, why: str) -> NoReturn:
    raise ValueError(f'{self.path}: {self.where}: {why}')

  def need(self, size: int):
    if size > self.size - self.at:
      self.refuse(
        f'at byte {self.at} come {size} more, but the file has {self.size}: it '
        'is cut short, or the length is wrong'
      )

  def number(self, format: str) -> Any:
    size = struct.calcsize(f'<{format}')
    self.need(size)
    (value,) = struct.unpack_from(f'<{format}', self.data, self.at)
    self.at += size
    return value

  def count(self, what: str, number: int, most: int, least_bytes: int):
    """Refuses a number of things that the file cannot hold."""
    if number > most:
      self.refuse(f'{number} {what}, more than the {most} that are read')
    if number * least_bytes > self.size - self.at:
      self.refuse(
        f'{number} {what} need {number * least_bytes} bytes and more, the file '
        f'has {self.size - self.at} left'
      )

  def string(self, most: int | None = None) -> str:
    size = self.number('Q')
    if most is not None and not 0 < size <= most:
      self.refuse(f'a name of {size} bytes; 1 to {most} are allowed')
    self.need(size)
    self.text += size
    if self.text > MAX_TEXT:
      self.refuse(f'names and strings of more than {MAX_TEXT} bytes')
    text = bytes(self.data[self.at : self.at + size])
    self.at += size
    try:
      return text.decode()
    except UnicodeDecodeError as error:
      self.refuse(f'{text[:40]!r} is not UTF-8: {error.reason}')

  def key(self, n: int):
    self.where = f'key {n}'
    name = self.string(_MAX_KEY)
    self.where = f'key {n} {name[:80]!r}'
    if name in self.metadata:
      self.refuse('is there twice')
    self.metadata[name] = self.value(self.number('I'))

  def value(self, type: int) -> Any:
    if type == _STRING:
      return self.string()
    if type == _ARRAY:
      return self.array()
    if type not in _SCALARS:
      self.refuse(f'has the unknown type {type}')
    dtype = np.dtype(_SCALARS[type])
    self.need(dtype.itemsize)
    if type == 7 and self.data[self.at] > 1:
      self.refuse(f'is a bool of value {self.data[self.at]}')
    value = np.frombuffer(self.data, dtype, 1, self.at)[0].item()
    self.at += dtype.itemsize
    return value

  def array(self) -> np.ndarray | Strings:
    type, length = self.number('I'), self.number('Q')
    if type == _STRING:
      self.count('strings', length, MAX_STRINGS - self.strings, 8)
      self.strings += length
      starts, at, end = array('q'), self.at, self.size
      size_at = struct.Struct('<Q').unpack_from
      for _ in range(length):
        if at + 8 > end:
          self.at = at
          self.need(8)
        starts.append(at)
        at += 8 + size_at(self.data, at)[0]
      if at > end:
        self.at = starts[-1] + 8
        self.need(at - self.at)
      self.at = at
      return Strings(self.data, starts, f'{self.path}: {self.where}')
    if type not in _SCALARS:
      self.refuse(
        'is an array of arrays, which ggml does not read either'
        if type == _ARRAY
        else f'is an array of the unknown type {type}'
      )
    dtype = np.dtype(_SCALARS[type])
    self.need(length * dtype.itemsize)
    raw = np.frombuffer(self.data, np.uint8, length * dtype.itemsize, self.at)
    if type == 7 and raw.size and raw.max() > 1:
      self.refuse('has a bool that is neither 0 nor 1')
    self.at += length * dtype.itemsize
    return raw.view(dtype)

  def alignment(self) -> int:
    self.where = 'general.alignment'
    value = self.metadata.get('general.alignment', 32)
    power = type(value) is int and value > 0 and value & (value - 1) == 0
    if not power or value > _MAX_ALIGNMENT:
      self.refuse(
        f'is {value!r:.40}, wanted a power of two up to {_MAX_ALIGNMENT}'
      )
    return value

  def tensor(self, n: int) -> Tensor:
    """One with its offset from the data's start."""
    self.where = f'tensor {n}'
    name = self.string(_MAX_NAME)
    self.where = f'tensor {n} {name!r}'
    dimensions = self.number('I')
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
      self.refuse(
        f'{dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are allowed'
      )
    shape = tuple(self.number('Q') for _ in range(dimensions))[::-1]
    type, offset = self.number('I'), self.number('Q')
    if type not in TYPES:
      self.refuse(
        f'type {type} is not known'
        + " (36 is I2_S of Microsoft's BitNet)" * (type == 36)
      )
    name_of_type, width, size = TYPES[type]
    if min(shape) < 1 or math.prod(shape) >= _WHOLE:
      self.refuse(f'shape {list(shape)}: each dimension must be 1 or more, and '
                  'all of them fewer than 2^63 weights')  # fmt: skip
    if shape[-1] % width:
      self.refuse(
        f'rows of {shape[-1]} are no whole blocks of {width} of {name_of_type}'
      )
    return Tensor(
      name, name_of_type, shape, offset, math.prod(shape) // width * size
    )

  def placed(
    self, found: list[Tensor], start: int, alignment: int
  ) -> dict[str, Tensor]:
    """Tensors with offsets from the file's start, each with its own bytes."""
    tensors: dict[str, Tensor] = {}
    for tensor in found:
      self.where = f'tensor {tensor.name!r}'
      if tensor.name in tensors:
        self.refuse('is there twice')
      if tensor.offset % alignment:
        self.refuse(f'offset {tensor.offset} is no multiple of {alignment}')
      end = start + tensor.offset + tensor.nbytes
      if end > self.size:
        self.refuse(
          f'ends at byte {end}, but the file has {self.size}: it is cut short, '
          'or the offset is wrong'
        )
      tensors[tensor.name] = tensor._replace(offset=start + tensor.offset)
    before = None
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
      if before and tensor.offset < before.offset + before.nbytes:
        self.where = f'tensor {tensor.name!r}'
        self.refuse(f'shares bytes with {before.name!r}')
      before = tensor
    return tensors
