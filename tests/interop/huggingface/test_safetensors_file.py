# SPDX-License-Identifier: Apache-2.0
import json
import struct

import ml_dtypes
import numpy as np
import pytest

from tritera_jax.interop.huggingface import safetensors_file
from tritera_jax.interop.huggingface.safetensors_file import TensorFiles


def entry(dtype='F32', shape=(4,), begin=0, end=16):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


def write(path, header, data=bytes(16)):
  """By hand, of the format's description."""
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(text)) + text + data)
  return path


def test_every_dtype_is_read_as_it_is_stored(tmp_path):
  kinds = {
    'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': ml_dtypes.bfloat16,
    'U8': 'u1', 'I8': 'i1',
  }  # fmt: skip
  assert set(kinds) == set(safetensors_file.DTYPES)
  header, data = {}, b''
  for name, dtype in kinds.items():
    bytes_ = np.arange(6).astype(dtype).tobytes()
    header[name] = entry(name, (2, 3), len(data), len(data) + len(bytes_))
    data += bytes_
  with TensorFiles(write(tmp_path / 'x', header, data)) as files:
    for name, dtype in kinds.items():
      assert files.tensors[name].shape == (2, 3)
      got = files.read(name)
      assert got.dtype == np.dtype(dtype)
      np.testing.assert_array_equal(got, np.arange(6).reshape(2, 3))


TWICE = b'{"a": %s, "a": %s}' % (
  json.dumps(entry()).encode(), json.dumps(entry('U8', (16,))).encode()
)  # fmt: skip


@pytest.mark.parametrize(
  ('header', 'words'),
  [
    (TWICE, "the name 'a' occurs twice"),
    ({'a': entry('BOOL', (16,))}, "tensor 'a': only the dtypes F64, F32"),
    ({'a': entry('F8_E4M3', (16,))}, "tensor 'a': only the dtypes"),
    ({'a': entry(shape=(4,) + 8 * (1,))}, 'shape must be a list of at most 8'),
    ({'a': entry(shape=(0,), end=0), 'b': entry()}, 'numbers above 0'),
    ({'a': entry(shape=(5,))}, 'not a whole safetensors file'),
    ({'a': entry(shape=(2,), end=8)}, 'not a whole safetensors file'),
    ({'a': entry(shape=(2,), begin=8)}, 'not a whole safetensors file'),
    ({'a': entry(shape=(2**40,))}, 'not a whole safetensors file'),
    ({'a': 1}, "tensor 'a': its header is no object"),
    (b'{"a": ' * 3000, 'cannot be read as JSON'),
  ],
)
def test_a_header_that_lies_is_refused(header, words, tmp_path):
  write(tmp_path / 'model.safetensors', header)
  with pytest.raises(ValueError, match=f'model.safetensors.*{words}'):
    TensorFiles(tmp_path)


@pytest.mark.parametrize(
  ('data', 'words'),
  [
    (b'', 'begins with nothing'),
    (b'\x01\x02', 'begins with 0102'),
    (struct.pack('<Q', 2**63) + b'{}', 'more than 4194304 bytes'),
    (struct.pack('<Q', 200) + b'{}', 'its header has 200 bytes, 2 are there'),
  ],
)
def test_a_length_that_lies_is_refused(data, words, tmp_path):
  (tmp_path / 'model.safetensors').write_bytes(data)
  with pytest.raises(ValueError, match=words):
    TensorFiles(tmp_path)


def index(folder, placed):
  (folder / safetensors_file.INDEX).write_text(
    json.dumps({'metadata': {}, 'weight_map': placed})
  )


def test_shards_are_one_checkpoint(tmp_path):
  write(tmp_path / 'x.safetensors', {'a': entry()})
  write(tmp_path / 'y.safetensors', {'b': entry('U8', (16,))})
  index(tmp_path, {'a': 'x.safetensors', 'b': 'y.safetensors'})
  with TensorFiles(tmp_path) as files:
    assert sorted(files.tensors) == ['a', 'b']
    assert files.read('b').dtype == np.uint8


@pytest.mark.parametrize(
  ('placed', 'words'),
  [
    ({'a': 'x.safetensors'}, "'b' is in no file by the index, and in y.saf"),
    ({'a': 'x.safetensors', 'b': 'x.safetensors'}, "'b' is in x.safete"),
    ({'a': 'x.safetensors', 'b': 'y.safetensors', 'c': 'y.safetensors'},
     "'c' is in y.safetensors by the index, and in no file"),
    ({'a': '../x.safetensors'}, 'the name of a safetensors file beside it'),
    ({'a': '/etc/x.safetensors'}, 'the name of a safetensors file beside it'),
    ({'a': '..\\x.safetensors'}, 'the name of a safetensors file beside it'),
    ({'a': '.safetensors'}, 'the name of a safetensors file beside it'),
    ({'a': 'x.bin'}, 'the name of a safetensors file beside it'),
    ({'a': 7}, 'the name of a safetensors file beside it'),
    ({}, 'has no "weight_map"'),
    ([], 'has no "weight_map"'),
  ],
)  # fmt: skip
def test_an_index_that_lies_is_refused(placed, words, tmp_path):
  write(tmp_path / 'x.safetensors', {'a': entry()})
  write(tmp_path / 'y.safetensors', {'b': entry()})
  if 'b' not in placed:
    placed = placed and {**placed, 'z': 'y.safetensors'}
    write(
      tmp_path / 'y.safetensors',
      {'z': entry(), 'b': entry(begin=16, end=32)},
      bytes(32),
    )
  index(tmp_path, placed)
  with pytest.raises(ValueError, match=words):
    TensorFiles(tmp_path)


def test_a_file_beside_an_index_is_refused(tmp_path):
  write(tmp_path / 'model.safetensors', {'a': entry()})
  write(tmp_path / 'x.safetensors', {'a': entry()})
  index(tmp_path, {'a': 'x.safetensors'})
  words = 'has model.safetensors and model.safetensors.index.json'
  with pytest.raises(ValueError, match=words):
    TensorFiles(tmp_path)
  index(tmp_path, {'a': 'model.safetensors'})  # some write it so
  with TensorFiles(tmp_path) as files:
    assert set(files.tensors) == {'a'}


def test_a_pointer_of_git_lfs_is_refused(tmp_path):
  file = tmp_path / 'model.safetensors'
  file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  with pytest.raises(ValueError, match=r'model.safetensors is .*git lfs pull'):
    TensorFiles(tmp_path)


def test_rows_are_read_alone(tmp_path):
  values = np.arange(12, dtype=ml_dtypes.bfloat16).reshape(4, 3)
  header = {'a': entry('BF16', (4, 3), 0, 24)}
  write(tmp_path / 'model.safetensors', header, values.tobytes())
  with TensorFiles(tmp_path) as files:
    np.testing.assert_array_equal(files.rows('a', [0, 3]), values[[0, 3]])


def test_what_is_missing_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='neither model.safetensors nor'):
    TensorFiles(tmp_path)
  index(tmp_path, {'a': 'x.safetensors'})
  with pytest.raises(FileNotFoundError, match='x.safetensors is missing, and'):
    TensorFiles(tmp_path)
  write(tmp_path / 'x.safetensors', {'a': entry()})
  write(tmp_path / 'y.safetensors', {'a': entry()})
  (tmp_path / safetensors_file.INDEX).write_text(
    '{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}'
  )
  with pytest.raises(ValueError, match="tensor 'a' is in .*x.safe.* and in"):
    TensorFiles(tmp_path)
