# SPDX-License-Identifier: Apache-2.0
"""Safetensors, one tensor in memory at a time.

The library writes a file of tensors that are all there. The layout
(github.com/huggingface/safetensors, "Format"): the length of the header in 8
bytes little-endian; the header, JSON, padded with spaces; the tensors' bytes
without gaps. Wider dtypes come first, as the library has them, so that all are
aligned. Of several files `model.safetensors.index.json` says what is where.
"""

from collections.abc import Callable, Sequence
import json
import math
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from tritera_jax.interop.huggingface import safetensors_file

Dtype = Literal['F32', 'F16', 'BF16', 'U8']
_BYTES: dict[Dtype, int] = {'F32': 4, 'F16': 2, 'BF16': 2, 'U8': 1}
_ALIGNMENT = 8


class Tensor(NamedTuple):
  """One tensor to be written: its header, and what makes it when its turn is.

  `make` returns an array of `shape` whose items have the size of `dtype`'s.
  """

  name: str
  dtype: Dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * _BYTES[self.dtype]


def write(
  folder: Path, tensors: Sequence[Tensor], *, shard_bytes: int
) -> list[Path]:
  """Writes a folder's safetensors: one file, or several and their index.

  Args:
    folder: where.
    tensors: all of them; their order is kept from file to file.
    shard_bytes: most bytes of tensors in a file, unless it has only one.

  Raises:
    ValueError: two tensors of one name, or what `make` makes is not as stated.
  """
  names = [tensor.name for tensor in tensors]
  if len(set(names)) < len(names):
    raise ValueError(f'two tensors of one name among {names}')
  shards: list[list[Tensor]] = [[]]
  for tensor in tensors:
    full = sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes
    if full and shards[-1]:
      shards.append([])
    shards[-1].append(tensor)
  if len(shards) == 1:
    files = [folder / safetensors_file.SINGLE]
  else:
    files = [
      folder / f'model-{n + 1:05}-of-{len(shards):05}.safetensors'
      for n in range(len(shards))
    ]
  for file, shard in zip(files, shards, strict=True):
    _write_file(file, shard)
  if len(shards) > 1:
    index = {
      'metadata': {'total_size': sum(t.nbytes for t in tensors)},
      'weight_map': {
        tensor.name: file.name
        for file, shard in zip(files, shards, strict=True)
        for tensor in shard
      },
    }
    (folder / safetensors_file.INDEX).write_text(
      json.dumps(index, indent=2) + '\n'
    )
  return files


def _write_file(file: Path, tensors: Sequence[Tensor]):
  tensors = sorted(tensors, key=lambda tensor: -_BYTES[tensor.dtype])
  # transformers refuses a file that does not say for whom it was written.
  header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for tensor in tensors:
    header[tensor.name] = {
      'dtype': tensor.dtype,
      'shape': tensor.shape,
      'data_offsets': [end, end + tensor.nbytes],
    }
    end += tensor.nbytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % _ALIGNMENT)
  with file.open('wb') as opened:
    opened.write(len(text).to_bytes(8, 'little'))
    opened.write(text)
    for tensor in tensors:
      array = np.ascontiguousarray(tensor.make())
      if (array.shape, array.nbytes) != (tensor.shape, tensor.nbytes):
        raise ValueError(
          f'{tensor.name} is {array.dtype}{list(array.shape)}, wanted '
          f'{tensor.dtype}{list(tensor.shape)}'
        )
      opened.write(array.reshape(-1).view(np.uint8))
