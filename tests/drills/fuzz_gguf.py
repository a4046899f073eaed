# SPDX-License-Identifier: Apache-2.0
"""Damages GGUF headers: each file is read or refused by a ValueError.

  python -m tests.drills.fuzz_gguf [--rounds 100000] [--seed 0]

The long one also stops at a file that takes more than a second, or more memory
than its own size and 100 MB. A file that was neither read nor refused stays
where the message says.
"""

import argparse
import collections
from collections.abc import Iterator
from pathlib import Path
import random
import resource
import signal
import struct
import tempfile
import time

from tritera_jax.interop.gguf import gguf_file

NUMBERS = (
  0, 1, 2, 3, 7, 8, 9, 31, 32, 33, 63, 64, 255, 256, 2**16, 2**20, 2**21,
  2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63,
  2**64 - 32, 2**64 - 8, 2**64 - 1,
)  # fmt: skip
SECONDS, BYTES = 1.0, 100 * 10**6


def string(text: bytes) -> bytes:
  return struct.pack('<Q', len(text)) + text


def seed_file(rng: random.Random) -> bytes:
  """A sound file of a few keys and tensors, of all kinds."""
  keys, tensors, data = [], [], b''
  kinds = 'B b H h I i f ? Q q d'.split()
  types = (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12)
  for n in range(rng.randint(1, 12)):
    name = f'key.{n}'.encode()
    which = rng.randrange(14)
    if which < 11:
      value = struct.pack('<' + kinds[which], rng.randint(0, 1))
      keys.append(string(name) + struct.pack('<I', types[which]) + value)
    elif which == 11:
      text = string('wört '.encode() * rng.randint(0, 4))
      keys.append(string(name) + struct.pack('<I', 8) + text)
    elif which == 12:
      length = rng.randint(0, 20)
      value = struct.pack(f'<IQ{length}f', 6, length, *length * [0.5])
      keys.append(string(name) + struct.pack('<I', 9) + value)
    else:
      length = rng.randint(0, 20)
      words = b''.join(string(f'token {i}'.encode()) for i in range(length))
      value = struct.pack('<IQ', 8, length) + words
      keys.append(string(name) + struct.pack('<I', 9) + value)
  if rng.random() < 0.5:
    value = struct.pack('<II', 4, 32)
    keys.append(string(b'general.alignment') + value)
  for n in range(rng.randint(0, 8)):
    type, width, size = rng.choice([(0, 1, 4), (1, 1, 2), (34, 256, 54),
                                    (35, 256, 66), (42, 64, 18)])  # fmt: skip
    shape = (width, *(rng.randint(1, 3) for _ in range(rng.randint(0, 3))))
    tensors.append(
      string(f'blk.{n}.weight'.encode())
      + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape, type, len(data))
    )
    nbytes = size
    for dimension in shape[1:]:
      nbytes *= dimension
    data += rng.randbytes(nbytes) + bytes(-nbytes % 32)
  text = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(keys))
  text += b''.join(keys + tensors)
  return text + bytes(-len(text) % 32) + data


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
  """`data` changed in one to four places; `other` lends parts of itself."""
  text = bytearray(data)
  for _ in range(rng.randint(1, 4)):
    at = rng.randrange(min(len(text), 24) if rng.random() < 0.2 else len(text))
    size = rng.randint(1, 40)
    what = rng.randrange(9)
    if what == 0:
      text[at] ^= 1 << rng.randrange(8)
    elif what == 1:
      text[at] = rng.randrange(256)
    elif what < 5:
      # Where a small number stands is most likely a length, type or count.
      small = [i for i in range(at, min(at + 64, len(text) - 8))
               if not any(text[i + 2 : i + 8])]  # fmt: skip
      at = rng.choice(small) if small and rng.random() < 0.7 else at
      number = rng.choice(NUMBERS) if rng.random() < 0.8 else len(text) - at
      width = rng.choice((4, 8))
      text[at : at + width] = (number % 256**width).to_bytes(width, 'little')
    elif what == 5:
      del text[at:]
    elif what == 6:
      del text[at : at + size]
    elif what == 7:
      text[at:at] = text[at : at + size]
    else:
      begin = rng.randrange(len(other))
      text[at : at + size] = other[begin : begin + size]
    if not text:
      break
  return bytes(text)


def make_file(path: Path, rng: random.Random):
  path.write_bytes(seed_file(rng))


def damage_file(path: Path, rng: random.Random):
  data = path.read_bytes()
  path.unlink()  # it may still be mapped
  path.write_bytes(mutated(data, seed_file(rng), rng))


def read_file(path: Path):
  """Reads all that a header says, and some of what it points to."""
  file = gguf_file.read(path)
  for value in file.metadata.values():
    if isinstance(value, gguf_file.Strings):
      list(value[:100])
  for name, tensor in file.tensors.items():
    if tensor.type in ('f32', 'f16'):
      file.floats(name)
    else:
      file.rows(name).sum()


def _alarm(*_):
  raise TimeoutError(f'more than {SECONDS} s')


def _virtual() -> int:
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  return pages * resource.getpagesize()


def drill(
  folder: Path, rounds: int, seed: int, limited: bool = False
) -> collections.Counter:
  """How many damaged files were 'read' and how many 'refused'.

  Args:
    folder: where files are written.
    rounds: files.
    seed: round n draws from seed + n alone.
    limited: also hold each to a second of this process's time and to memory;
      for a process of its own.
  """
  counts = collections.Counter()
  path = folder / 'damaged.gguf'
  if limited:
    signal.signal(signal.SIGPROF, _alarm)
  for n in range(rounds):
    rng = random.Random(seed + n)
    path.unlink(missing_ok=True)
    make_file(path, rng)
    read_file(path)
    damage_file(path, rng)
    if limited:
      room = _virtual() + path.stat().st_size + BYTES
      resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
      signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
      read_file(path)
      counts['read'] += 1
    except ValueError as error:
      assert str(error).startswith(str(path)), error
      counts['refused'] += 1
    except BaseException as error:
      raise AssertionError(
        f'{path}, round {n} of seed {seed}: {error!r}'
      ) from error
    finally:
      if limited:
        signal.setitimer(signal.ITIMER_PROF, 0)
  return counts


def largest() -> Iterator[tuple[str, bytes]]:
  """Sound files that are nothing but as many things as may be."""
  start = b'GGUF' + struct.pack('<I', 3)
  one = start + struct.pack('<QQ', 0, 1) + string(b'k')
  count = gguf_file.MAX_STRINGS
  yield (
    f'{count:,} empty strings',
    (one + struct.pack('<IIQ', 9, 8, count) + bytes(8 * count)),
  )
  count = gguf_file.MAX_TENSORS
  yield f'{count:,} tensors', (
    start + struct.pack('<QQ', count, 0)
    + b''.join(
      string(b'%d' % n) + struct.pack('<IQIQ', 1, 8, 0, 32 * n)
      for n in range(count)
    ) + bytes(32 + 32 * count)
  )  # fmt: skip
  count = gguf_file.MAX_KEYS
  yield f'{count:,} keys', (
    start + struct.pack('<QQ', 0, count)
    + b''.join(
      string(b'%d' % n) + struct.pack('<IB', 0, 0) for n in range(count)
    )
  )  # fmt: skip
  text = b'x' * (gguf_file.MAX_TEXT - 10) + '😀'.encode()
  yield 'the longest string', one + struct.pack('<I', 8) + string(text)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rounds', type=int, default=100_000)
  parser.add_argument('--seed', type=int, default=0)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'largest.gguf'
    for what, data in largest():
      path.write_bytes(data)
      begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      started = time.process_time()
      gguf_file.read(path)
      spent = time.process_time() - started
      grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun
      print(
        f'{what}: {len(data) / 1e6:.1f} MB, {spent:.2f} s, '
        f'peak memory {grown / 1e3:+.1f} MB'
      )
  folder = Path(tempfile.mkdtemp())  # stays, with the file that was too much
  started = time.process_time()
  counts = drill(folder, options.rounds, options.seed, limited=True)
  print(
    f'{options.rounds:,} damaged headers of seed {options.seed}: '
    f'{counts["read"]:,} read, {counts["refused"]:,} refused, none else; '
    f'none past {SECONDS:.0f} s or its size and {BYTES // 10**6} MB; '
    f'{time.process_time() - started:.0f} s'
  )


if __name__ == '__main__':
  main()
