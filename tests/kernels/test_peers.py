# SPDX-License-Identifier: Apache-2.0
import ctypes
import importlib.metadata
import json
from pathlib import Path
import runpy
import sys

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / 'kernels' / 'bench' / 'llama_cpp.py'
ROWS, K = 6, 512


@pytest.fixture(scope='module')
def process() -> dict:
  return runpy.run_path(str(BENCH.with_name('llama_process.py')))


@pytest.fixture(scope='module')
def models() -> dict:
  return runpy.run_path(str(BENCH.with_name('random_gguf.py')))


def run(monkeypatch, *arguments: str):
  monkeypatch.setattr(sys, 'argv', [str(BENCH), *arguments])
  runpy.run_path(str(BENCH), run_name='__main__')


def decoded_tq2_0(block: bytes) -> list[float]:
  # Two halves of 128 weights: 32 bytes whose four 2-bit planes follow another.
  d = float(np.frombuffer(block[64:], '<f2')[0])
  codes = [
    block[32 * half + i] >> 2 * plane & 3
    for half in range(2)
    for plane in range(4)
    for i in range(32)
  ]
  assert set(codes) <= {0, 1, 2}
  return [d * (code - 1) for code in codes]


def digits(byte: int, count: int) -> list[int]:
  # The first digit is what three times the fraction byte / 256 carries.
  found = []
  for _ in range(count):
    found.append(3 * byte >> 8)
    byte = 3 * byte & 255
  return found


def decoded_tq1_0(block: bytes) -> list[float]:
  # 32 bytes of five planes, 16 of five, 4 of four.
  d = float(np.frombuffer(block[52:], '<f2')[0])
  weights = []
  for start, count, planes in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
    part = [digits(byte, planes) for byte in block[start : start + count]]
    for byte, of_byte in zip(block[start : start + count], part, strict=True):
      five = of_byte + (5 - planes) * [0]
      value = sum(3 ** (4 - i) * digit for i, digit in enumerate(five))
      assert byte == -(-256 * value // 243)
    weights += [
      d * (part[i][p] - 1) for p in range(planes) for i in range(count)
    ]
  return weights


@pytest.mark.parametrize(
  'type, block_bytes, decoded',
  [('tq2_0', 66, decoded_tq2_0), ('tq1_0', 54, decoded_tq1_0)],
)
def test_random_blocks_hold_trits(models, type, block_bytes, decoded):
  rows = models['random_blocks'](type, ROWS, K, np.random.default_rng(0))
  assert rows.shape == (ROWS, K // 256 * block_bytes)
  weights = np.array(
    [
      [
        weight
        for start in range(0, rows.shape[1], block_bytes)
        for weight in decoded(row[start : start + block_bytes].tobytes())
      ]
      for row in rows
    ]
  )
  assert weights.shape == (ROWS, K)
  values, counts = np.unique(weights, return_counts=True)
  np.testing.assert_allclose(values, np.sqrt(1.5 / K) * np.r_[-1, 0, 1], 1e-3)
  assert (np.abs(counts / weights.size - 1 / 3) < 0.05).all()


@pytest.mark.parametrize('type', ['tq2_0', 'tq1_0', 'f16', 'q6_k'])
def test_the_gguf_package_reads_the_same_variance(models, type):
  gguf = pytest.importorskip('gguf')
  rows = models['random_blocks'](type, ROWS, K, np.random.default_rng(0))
  weights = gguf.quants.dequantize(
    rows.view(np.float16) if type == 'f16' else rows,
    gguf.GGMLQuantizationType(models['TYPES'][type].id),
  )
  assert weights.shape == (ROWS, K)
  assert abs(K * np.var(weights.astype(np.float64)) - 1) < 0.1


def test_part_of_a_block_is_refused(models):
  with pytest.raises(ValueError, match='300 inputs are no whole blocks of 256'):
    models['random_blocks']('tq2_0', 1, 300, np.random.default_rng(0))


@pytest.mark.parametrize(
  'arguments, package',
  [
    (('matmul', '--shape', '256', '256'), 'llama-cpp-python'),
    (('decode',), 'llama-cpp-python'),
    (('model', 'no.gguf'), 'gguf'),
  ],
)
def test_without_the_extra_it_says_which(monkeypatch, arguments, package):
  def missing(name: str):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'version', missing)
  with pytest.raises(SystemExit) as stopped:
    run(monkeypatch, *arguments)
  assert str(stopped.value) == (
    f"llama.cpp as a peer needs {package}: pip install 'tritera_jax[peers]'"
  )


def test_an_option_that_llama_cpp_lacks_is_not_dropped(process):
  class Options(ctypes.Structure):
    _fields_ = (('load_mode', ctypes.c_int),)

  assert process['filled'](Options(), load_mode=3).load_mode == 3
  with pytest.raises(SystemExit, match="no \\['use_mmap'\\] in Options"):
    process['filled'](Options(), use_mmap=True)


TINY = '--d 256 --ffn 512 --layers 2 --heads 4 --kv-heads 2 --vocabulary 300'


def test_a_model_file_holds_what_was_asked(monkeypatch, tmp_path):
  gguf = pytest.importorskip('gguf')
  path = tmp_path / 'tiny.gguf'
  run(monkeypatch, 'model', str(path), *TINY.split())
  reader = gguf.GGUFReader(path)
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  assert len(tensors) == 3 + 2 * 9
  kinds = gguf.GGMLQuantizationType
  for name, kind, shape in (
    ('token_embd.weight', kinds.Q6_K, [256, 300]),
    ('output.weight', kinds.Q6_K, [256, 300]),
    ('blk.1.attn_k.weight', kinds.TQ2_0, [256, 128]),
    ('blk.1.ffn_down.weight', kinds.TQ2_0, [512, 256]),
    ('blk.0.ffn_norm.weight', kinds.F32, [256]),
  ):
    assert tensors[name].tensor_type == kind
    assert tensors[name].shape.tolist() == shape


@pytest.mark.parametrize(
  'arguments, rows',
  [
    ('matmul --shape 256 512 --m 1 3 --pages 4k --mib 1 --seconds 0.01', 2),
    (
      f'decode --position 4 --batch 1 2 --prefill 8 --tokens 2 --repeats 1 '
      f'--pages huge --type tq1_0 {TINY}',
      3,
    ),
  ],
)
def test_every_line_says_what_was_timed(monkeypatch, capfd, arguments, rows):
  for package in ('llama-cpp-python', 'gguf'):
    try:
      importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pytest.skip(f'needs {package}: the extra peers')
  run(monkeypatch, *arguments.split())
  head, *found = map(json.loads, capfd.readouterr().out.splitlines())
  assert {'command', 'date', 'machine', 'llama.cpp', 'gguf'} <= set(head)
  assert len(found) == rows
  for row in found:
    assert 0 < row['min_ms'] <= row['median_ms'] <= row['max_ms']
    assert row['threads'] and row['pages']
