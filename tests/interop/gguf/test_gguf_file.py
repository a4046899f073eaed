# SPDX-License-Identifier: Apache-2.0
"""The GGUF reader on files of the `gguf` package, and on damaged ones."""

from collections.abc import Sequence
from pathlib import Path
import struct

import gguf
import numpy as np
import pytest

from tests.drills import fuzz_gguf
from tritera_jax.interop.gguf import gguf_file

Types = gguf.GGMLQuantizationType


def written(folder: Path, alignment: int = 32) -> Path:
  """A file of the gguf package with every kind of key and some tensors."""
  path = folder / 'file.gguf'
  writer = gguf.GGUFWriter(path, 'llama')
  if alignment != 32:
    writer.add_custom_alignment(alignment)
  writer.add_uint8('u8', 200)
  writer.add_int8('i8', -100)
  writer.add_uint16('u16', 60000)
  writer.add_int16('i16', -30000)
  writer.add_uint32('u32', 4 * 10**9)
  writer.add_int32('i32', -2 * 10**9)
  writer.add_uint64('u64', 2**63)
  writer.add_int64('i64', -(2**62))
  writer.add_float32('f32', 0.5)
  writer.add_float64('f64', 0.1)
  writer.add_bool('yes', True)
  writer.add_string('text', 'naïve ✓')
  writer.add_array('strings', ['a', 'ĠĊ', 'ab c'])
  writer.add_array('floats', [0.5, -1.5])
  writer.add_array('ints', [3, 2, 1])
  writer.add_array('bools', [True, False])
  rng = np.random.default_rng(0)
  w = rng.standard_normal((2, 3, 256)).astype(np.float32)
  writer.add_tensor('f32.weight', w)
  writer.add_tensor('f16.weight', w[0].astype(np.float16))
  for kind in (Types.BF16, Types.Q8_0, Types.TQ1_0):
    writer.add_tensor(
      kind.name, gguf.quants.quantize(w[1], kind), raw_dtype=kind
    )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize('alignment', [32, 64])
def test_what_the_gguf_package_wrote_is_read(tmp_path, alignment):
  path = written(tmp_path, alignment)
  file = gguf_file.read(path)
  assert file.version == 3
  scalars = {k: v for k, v in file.metadata.items() if np.isscalar(v)}
  wanted = {
    'general.architecture': 'llama', 'u8': 200, 'i8': -100, 'u16': 60000,
    'i16': -30000, 'u32': 4 * 10**9, 'i32': -2 * 10**9, 'u64': 2**63,
    'i64': -(2**62), 'f32': 0.5, 'f64': 0.1, 'yes': True, 'text': 'naïve ✓',
  }  # fmt: skip
  if alignment != 32:
    wanted['general.alignment'] = 64
  assert scalars == wanted
  assert list(file.metadata['strings']) == ['a', 'ĠĊ', 'ab c']
  assert file.metadata['strings'][1:] == ['ĠĊ', 'ab c']
  assert file.metadata['floats'].tolist() == [0.5, -1.5]
  assert file.metadata['ints'].tolist() == [3, 2, 1]
  assert file.metadata['bools'].tolist() == [True, False]
  theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
  assert list(file.tensors) == list(theirs)
  for name, tensor in theirs.items():
    ours = file.tensors[name]
    assert ours.shape == tuple(int(d) for d in tensor.shape[::-1])
    assert ours.offset == tensor.data_offset
    raw = np.ascontiguousarray(tensor.data).view(np.uint8)
    assert file.rows(name).tobytes() == raw.tobytes()
    if ours.type == 'tq1_0':
      with pytest.raises(ValueError, match='tq1_0; f32, f16, bf16 and q8_0'):
        file.floats(name)
    else:
      dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
      np.testing.assert_array_equal(
        file.floats(name), dense.reshape(ours.shape)
      )


def test_types_are_ggmls():
  for kind, (width, size) in gguf.GGML_QUANT_SIZES.items():
    if kind.value in gguf_file.TYPES:
      assert gguf_file.TYPES[kind.value] == (kind.name.lower(), width, size)
  there = {kind.name for kind in gguf.GGML_QUANT_SIZES}
  missing = there - {name.upper() for name in gguf_file.TYPE_IDS}
  # What activations are rounded to, and no file holds.
  assert missing == {'Q8_1', 'Q8_K'}


def string(text: bytes) -> bytes:
  return struct.pack('<Q', len(text)) + text


def header(
  keys: Sequence[bytes] = (),
  tensors: Sequence[bytes] = (),
  *,
  magic: bytes = b'GGUF',
  version: int = 3,
  counts: tuple[int, int] | None = None,
  data: bytes = bytes(128),
) -> bytes:
  """A file of given keys and tensors, aligned to 32."""
  n_tensors, n_keys = counts or (len(tensors), len(keys))
  text = magic + struct.pack('<IQQ', version, n_tensors, n_keys)
  text += b''.join([*keys, *tensors])
  return text + bytes(-len(text) % 32) + data


def key(name: bytes, type: int, value: bytes) -> bytes:
  return string(name) + struct.pack('<I', type) + value


def tensor(
  name: bytes = b't', shape=(8,), type: int = 0, offset: int = 0, rank=None
) -> bytes:
  dims = struct.pack(f'<{len(shape)}Q', *shape)
  rank = struct.pack('<I', len(shape) if rank is None else rank)
  return string(name) + rank + dims + struct.pack('<IQ', type, offset)


U32 = struct.pack('<I', 7)
LONG = struct.pack('<Q', 2**62)
BAD = {
  'begins with b.GGML': header(magic=b'GGML'),
  'is of version 1; 2 and 3': header(version=1),
  'is big-endian': header(version=0x03000000),
  'tensors, more than the': header(counts=(2**63, 0)),
  'keys need 700000 bytes': header(counts=(0, 50000)),
  'keys, more than the': header(counts=(0, 2**20)),
  "key 0 'k': at byte": header([key(b'k', 8, LONG)]),
  'key 0: a name of 4611686018427387904 bytes': header([LONG]),
  'a name of 0 bytes': header([key(b'', 4, U32)]),
  "key 1 'k': is there twice": header(2 * [key(b'k', 4, U32)]),
  'unknown type 13': header([key(b'k', 13, U32)]),
  'a bool of value 7': header([key(b'k', 7, U32)]),
  "key 0 'k': b'.xff.xfe' is not UTF-8": header(
    [key(b'k', 8, string(b'\xff\xfe'))]
  ),
  'array of arrays': header([key(b'k', 9, struct.pack('<IQ', 9, 1))]),
  'array of the unknown type 99': header(
    [key(b'k', 9, struct.pack('<IQ', 99, 1))]
  ),
  'strings, more than the': header(
    [key(b'k', 9, struct.pack('<IQ', 8, 2**40))]
  ),
  'strings need': header([key(b'k', 9, struct.pack('<IQ', 8, 1000))]),
  'come 18446744073709551615 more': header(
    [key(b'k', 9, struct.pack('<IQQ', 8, 1, 2**64 - 1))]
  ),
  'come 36893488147419103230 more': header(
    [key(b'k', 9, struct.pack('<IQ', 2, 2**64 - 1))]
  ),
  'neither 0 nor 1': header([key(b'k', 9, struct.pack('<IQB', 7, 1, 2))]),
  'general.alignment: is 7': header([key(b'general.alignment', 4, U32)]),
  'general.alignment: is 0': header([key(b'general.alignment', 4, bytes(4))]),
  'a name of 64 bytes': header(tensors=[tensor(64 * b'n')]),
  '0 dimensions': header(tensors=[tensor(rank=0)]),
  '4294967295 dimensions': header(tensors=[tensor(rank=2**32 - 1)]),
  'type 4 is not known': header(tensors=[tensor(type=4)]),
  "I2_S of Microsoft's": header(tensors=[tensor(type=36)]),
  'each dimension must be 1': header(tensors=[tensor(shape=(8, 0))]),
  'fewer than 2.63': header(tensors=[tensor(shape=(2**40, 2**40))]),
  'rows of 8 are no whole blocks of 256 of tq1_0': header(
    tensors=[tensor(type=34)]
  ),
  'offset 8 is no multiple of 32': header(tensors=[tensor(offset=8)]),
  'ends at byte': header(tensors=[tensor(shape=(40,))]),
  "'t': ends at byte 1844": header(tensors=[tensor(offset=2**64 - 32)]),
  "tensor 't': is there twice": header(tensors=[tensor(), tensor(offset=32)]),
  "'u': shares bytes with 't'": header(
    tensors=[tensor(shape=(9,)), tensor(b'u', offset=32)]
  ),
}


@pytest.mark.parametrize('message', BAD)
def test_what_is_damaged_is_refused_by_name(tmp_path, message):
  path = tmp_path / 'bad.gguf'
  path.write_bytes(BAD[message])
  with pytest.raises(ValueError, match=message) as error:
    gguf_file.read(path)
  assert str(error.value).startswith(str(path))


def test_what_they_are_made_of_is_read(tmp_path):
  """So each is refused for what is wrong with it alone."""
  path = tmp_path / 'good.gguf'
  keys = [key(b'k', 4, U32), key(b'general.alignment', 4, b'\x20\0\0\0')]
  path.write_bytes(header(keys, [tensor(), tensor(b'u', offset=32)], version=2))
  file = gguf_file.read(path)
  assert file.version == 2 and file.value('k', int) == 7
  assert file.floats('u').tolist() == [0] * 8
  for name, kind, message in (
    ('none', int, 'none is missing, wanted int'),
    ('k', str, 'k is 7, wanted str'),
    ('k', bool, 'k is 7, wanted bool'),
  ):
    with pytest.raises(ValueError, match=message):
      file.value(name, kind)
  with pytest.raises(ValueError, match='no tensor x'):
    file.rows('x')


def test_what_is_no_file_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='is no file'):
    gguf_file.read(tmp_path)
  (tmp_path / 'empty').touch()
  with pytest.raises(ValueError, match='has 0 bytes'):
    gguf_file.read(tmp_path / 'empty')


def test_a_token_that_is_not_utf_8_is_refused_when_it_is_read(tmp_path):
  path = tmp_path / 'tokens.gguf'
  value = struct.pack('<IQ', 8, 2) + string(b'ok') + string(b'\xc0')
  path.write_bytes(header([key(b'tokens', 9, value)]))
  tokens = gguf_file.read(path).metadata['tokens']
  assert tokens[0] == 'ok'
  with pytest.raises(ValueError, match=r'tokens..1. is not UTF-8'):
    list(tokens)


def test_damaged_headers_are_read_or_refused(tmp_path):
  counts = fuzz_gguf.drill(tmp_path, rounds=400, seed=0)
  assert counts['refused'] > 200 and sum(counts.values()) == 400
