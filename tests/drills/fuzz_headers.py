# SPDX-License-Identifier: Apache-2.0
"""Feeds the readers of foreign files with damaged headers.

Each round takes a tiny sound file, changes its header or its index - bits,
bytes, a cut, a field swapped with another, a huge number, nesting, a name twice
- and reads it. A ValueError or OSError with words is right, and so are tensors
whose shapes are those of the header that was read; anything else ends the
drill, as do a second of processor time in one round and 100 MB beside the file.

  python -m tests.drills.fuzz_headers --rounds 100000
"""

from collections.abc import Callable
import json
from pathlib import Path
import random
import resource
import struct
import tempfile
import time
from typing import NamedTuple

import numpy as np
import safetensors.numpy
import tqdm
import tyro

from tests.drills import fuzz_gguf
from tritera_jax.interop.huggingface import safetensors_file
from tritera_jax.interop.huggingface.safetensors_file import TensorFiles

SECONDS, MEGABYTES = 1.0, 100
NUMBERS = (
  -1, 0, 1, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**48, 2**53 + 1,
  2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.5, 1e308,
)  # fmt: skip
WORDS = (
  '', 'a', 'b', '__metadata__', 'F32', 'F16', 'BF16', 'F8_E4M3', 'BOOL', 'I64',
  'f32', '../a', '\x00', '\ud800', 'é' * 50, 'model.safetensors',
)  # fmt: skip


class Reader(NamedTuple):
  """A kind of file: how to make a sound one, damage it, and read it.

  Attributes:
    make: writes a sound file, or folder, of tensors drawn from a seed.
    damage: of the path of a sound one makes one that may not be.
    read: reads all of it and checks what it got.
  """

  make: Callable[[Path, random.Random], None]
  damage: Callable[[Path, random.Random], None]
  read: Callable[[Path], None]


def _arrays(rng: random.Random) -> dict[str, np.ndarray]:
  kinds = ('f4', 'f2', 'u1', 'f8', 'i1')
  return {
    name: np.zeros(
      [rng.randint(1, 4) for _ in range(rng.randint(0, 3))], rng.choice(kinds)
    )
    for name in ('a', 'b', 'c.weight', 'd')[: rng.randint(1, 4)]
  }


def make_file(path: Path, rng: random.Random):
  metadata = {'format': 'pt'} if rng.random() < 0.5 else None
  safetensors.numpy.save_file(_arrays(rng), path, metadata)


def damage_file(path: Path, rng: random.Random):
  data = path.read_bytes()
  length = int.from_bytes(data[:8], 'little')
  header, rest = data[8 : 8 + length], data[8 + length :]
  kind = rng.randrange(6)
  if kind == 0:
    data = _bits(data, rng, 8 + length)
  elif kind == 1:
    data = data[: rng.randrange(len(data))]
  elif kind == 2:
    # A length that lies.
    told = rng.choice([abs(int(n)) % 2**64 for n in NUMBERS if n < 1e30])
    told = rng.choice([told, length + rng.randint(-9, 9)])
    data = struct.pack('<Q', max(told, 0)) + header + rest
  else:
    text = damaged_json(header, rng)
    data = struct.pack('<Q', len(text)) + text + rest
    if rng.random() < 0.1:
      data += bytes(rng.randrange(64))
  path.write_bytes(data)


def read_file(path: Path):
  with TensorFiles(path) as files:
    for name, stored in files.tensors.items():
      got = files.read(name)
      assert got.shape == stored.shape, (got.shape, stored)
      assert got.nbytes <= path.stat().st_size, stored


def make_folder(path: Path, rng: random.Random):
  path.mkdir(exist_ok=True)
  placed = {}
  for n in range(rng.randint(1, 3)):
    shard = f'model-{n}.safetensors'
    arrays = {f'{name}.{n}': x for name, x in _arrays(rng).items()}
    safetensors.numpy.save_file(arrays, path / shard)
    placed |= dict.fromkeys(arrays, shard)
  index = {'metadata': {'total_size': 1}, 'weight_map': placed}
  (path / safetensors_file.INDEX).write_text(json.dumps(index))


def damage_folder(path: Path, rng: random.Random):
  index = path / safetensors_file.INDEX
  kind = rng.randrange(8)
  if kind == 0:
    rng.choice(sorted(path.glob('*.safetensors'))).unlink()
  elif kind == 1:
    damage_file(rng.choice(sorted(path.glob('*.safetensors'))), rng)
  elif kind == 2:
    index.write_bytes(_bits(index.read_bytes(), rng))
  else:
    index.write_bytes(damaged_json(index.read_bytes(), rng))


def read_folder(path: Path):
  with TensorFiles(path) as files:
    for name, stored in files.tensors.items():
      assert stored.file.parent == path, stored
      assert files.read(name).shape == stored.shape


# By the name that --readers takes.
READERS = {
  'safetensors': Reader(make_file, damage_file, read_file),
  'index': Reader(make_folder, damage_folder, read_folder),
  'gguf': Reader(
    fuzz_gguf.make_file, fuzz_gguf.damage_file, fuzz_gguf.read_file
  ),
}


def _bits(data: bytes, rng: random.Random, within: int | None = None) -> bytes:
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8))):
    changed[rng.randrange(within or len(data))] ^= 1 << rng.randrange(8)
  return bytes(changed)


def damaged_json(text: bytes, rng: random.Random) -> bytes:
  """JSON with something else in one of its places, or its text disturbed."""
  kind = rng.randrange(10)
  if kind == 0:
    return _bits(text, rng)
  if kind == 1:
    at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return text[:at] + rng.choice([b'', text[at:end] * 2]) + text[end:]
  if kind == 2:
    deep = rng.choice((3, 100, 2000))
    piece = rng.choice([b'[', b'{"a":', b'[[],'])
    at = rng.randrange(len(text))
    return text[:at] + piece * deep + text[at:]
  found = json.loads(text)
  # Of random places, each in its parent.
  places: list[tuple] = []

  def walk(value):
    if isinstance(value, dict):
      places.extend((value, key) for key in value)
    elif isinstance(value, list):
      places.extend((value, n) for n in range(len(value)))
    for child in value.values() if isinstance(value, dict) else value:
      if isinstance(child, dict | list):
        walk(child)

  walk(found)
  if not places:
    return text + b' '
  for _ in range(rng.choice((1, 1, 2))):
    parent, key = rng.choice(places)
    other, there = rng.choice(places)
    if kind == 3:
      parent[key] = rng.choice(NUMBERS)
    elif kind == 4:
      parent[key] = rng.choice(WORDS)
    elif kind == 5:
      if other.__class__ is parent.__class__ and key in _keys(parent):
        parent[key], other[there] = other[there], parent[key]
    elif kind == 6 and isinstance(parent, dict):
      try:
        return _twice(found, parent, key, rng)
      except ValueError:
        return text[1:]
    elif kind == 7:
      parent[key] = rng.choice(
        ([], {}, None, True, [[1]], [1] * 100, {'a': 1}, [2**40] * 3)
      )
    elif kind == 8 and isinstance(parent, list):
      parent.append(rng.choice(NUMBERS))
    elif isinstance(parent, dict):
      parent[rng.choice(WORDS)] = parent[key]
  try:
    return json.dumps(found).encode()
  except (ValueError, RecursionError):  # a place that holds itself
    return text[:-1]


def _keys(parent):
  return parent if isinstance(parent, dict) else range(len(parent))


def _twice(found, parent: dict, key: str, rng: random.Random) -> bytes:
  """The text with a name of one object twice."""
  mark = 'e4a1'
  parent[mark] = rng.choice((parent[key], 1, found.get('a')))
  text = json.dumps(found)
  return text.replace(json.dumps(mark), json.dumps(key), 1).encode()


def _megabytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def drill(
  rounds: int = 1000,
  seed: int = 0,
  readers: tuple[str, ...] = tuple(READERS),
  folder: Path | None = None,
) -> str:
  """Damages and reads so many files of each kind; what came of them.

  Args:
    rounds: files of each kind.
    seed: round n draws from seed + n alone.
    readers: kinds of files.
    folder: where to put them; default: a new one.
  """
  said = []
  for kind in readers:
    reader, refused, slowest = READERS[kind], 0, 0.0
    with tempfile.TemporaryDirectory(dir=folder) as place:
      before = _megabytes()
      for n in tqdm.tqdm(range(rounds), desc=kind, leave=False, disable=None):
        rng = random.Random(seed + n)
        path = Path(place) / f'{n}'
        reader.make(path, rng)
        reader.damage(path, rng)
        started = time.process_time()
        try:
          reader.read(path)
        except (ValueError, OSError) as error:
          refused += 1
          assert str(error), f'{kind}, round {n}: {error!r} says nothing'
        except BaseException:
          print(f'{kind}: round {n} of seed {seed}: {path.absolute()}')
          raise
        took = time.process_time() - started
        slowest = max(slowest, took)
        assert took < SECONDS, f'{kind}, round {n}: {took:.1f} s'
        if path.is_dir():
          for file in path.iterdir():
            file.unlink()
          path.rmdir()
        else:
          path.unlink()
      grown = _megabytes() - before
      assert grown < MEGABYTES, f'{kind}: {grown:.0f} MB'
    said.append(
      f'{kind}: {rounds:,} damaged, {refused:,} refused, the others read; at '
      f'most {slowest * 1e3:.0f} ms and {grown:.0f} MB'
    )
  return '\n'.join(said)


if __name__ == '__main__':
  print(tyro.cli(drill))
