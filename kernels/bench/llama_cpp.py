# SPDX-License-Identifier: Apache-2.0
"""Times llama.cpp on ternary weights: the peer of this project's CPU kernels.

  python kernels/bench/llama_cpp.py matmul --shape N K [--m M ...]
  python kernels/bench/llama_cpp.py decode [--model FILE | --type TYPE]
  python kernels/bench/llama_cpp.py model FILE [--type TYPE]

Needs the extra `peers`. A line of JSON for each measurement, after one that
says command, machine, date and versions. Each measurement has a process of its
own, whose weights lie in the pages that it reports. Weights are random, so what
a model says means nothing, but every block of bytes is a valid one.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import importlib.metadata
import json
import mmap
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np

PACKAGES = ('llama-cpp-python', 'gguf')
CACHE_BYTES = 2**28
HUGE_PAGE = 2**21


@dataclasses.dataclass(frozen=True)
class BlockType:
  """A quantisation of ggml: how many weights a block of how many bytes has."""

  id: int
  weights: int
  bytes: int

  def row_bytes(self, K: int) -> int:
    if K % self.weights:
      raise ValueError(f'{K} inputs are no whole blocks of {self.weights}')
    return K // self.weights * self.bytes


TYPES = {
  'f16': BlockType(1, 1, 2),
  'q6_k': BlockType(14, 256, 210),
  'tq1_0': BlockType(34, 256, 54),
  'tq2_0': BlockType(35, 256, 66),
}
TERNARY = ('tq2_0', 'tq1_0', 'f16')


@dataclasses.dataclass(frozen=True)
class Config:
  """A Llama architecture; by default one of 1.1 billion parameters."""

  d: int = 2048
  ffn: int = 5632
  layers: int = 22
  heads: int = 32
  kv_heads: int = 4
  vocabulary: int = 32000
  context: int = 2048


def require_extra(*packages: str) -> dict[str, str]:
  """The versions of the extra's packages; exits where one is missing."""
  versions = {}
  for package in packages or PACKAGES:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      raise SystemExit(
        f"llama.cpp as a peer needs {package}: pip install 'tritera_jax[peers]'"
      ) from None
  return versions


def random_blocks(
  type: str, rows: int, K: int, rng: np.random.Generator
) -> np.ndarray:
  """Random weights [rows, K] as rows of bytes, of variance 1 / K.

  The ternary types hold -d, 0 and d, equally often, with one d for all.

  Args:
    type: a name in TYPES.
    rows: the number of rows.
    K: the weights of a row; whole blocks.
    rng: the generator.
  """
  block = TYPES[type]
  row_bytes = block.row_bytes(K)
  d = np.float16(np.sqrt(1.5 / K))
  if type == 'f16':
    values = np.array([-d, 0, d], np.float16)
    trits = rng.integers(0, 3, (rows, K), np.uint8)
    return values[trits].view(np.uint8)
  blocks = np.empty((rows * K // block.weights, block.bytes), np.uint8)
  if type == 'q6_k':
    # 6 bits a weight around 32, of which each 16 share an int8 scale: every
    # byte is valid. Uniform in -32..31 has the standard deviation 18.5.
    blocks[:, :192] = rng.integers(0, 256, (len(blocks), 192), np.uint8)
    blocks[:, 192:208] = 64
    d = np.float16(1 / (18.5 * 64 * np.sqrt(K)))
  elif type == 'tq2_0':
    # Four codes 0..2 in a byte.
    codes = np.arange(3, dtype=np.uint8)
    fours = np.add.outer(np.add.outer(codes << 6, codes << 4),
                         np.add.outer(codes << 2, codes)).ravel()  # fmt: skip
    blocks[:, :64] = fours[rng.integers(0, 81, (len(blocks), 64))]
  else:
    # Five base-3 digits v as ceil(256 v / 243); the last four bytes hold four
    # digits each, and a fifth that is 0.
    fives = -(-256 * np.arange(243) // 243)
    blocks[:, :48] = fives[rng.integers(0, 243, (len(blocks), 48))]
    blocks[:, 48:52] = fives[3 * rng.integers(0, 81, (len(blocks), 4))]
  blocks[:, -2:] = np.array([d], '<f2').view(np.uint8)
  return blocks.reshape(rows, row_bytes)


def random_model(
  path: str | Path,
  config: Config = Config(),
  type: str = 'tq2_0',
  head: str = 'q6_k',
  seed: int = 0,
):
  """Writes a random ternary GGUF model, one tensor in memory at a time.

  Args:
    path: the file to write.
    config: the architecture.
    type: the type of the linear layers' weights.
    head: the type of the token embedding and of the output layer.
    seed: of the weights.
  """
  require_extra('gguf')
  import gguf

  head_dim = config.d // config.heads
  kv = config.kv_heads * head_dim
  linear = {
    'attn_q': (config.d, config.d),
    'attn_k': (kv, config.d),
    'attn_v': (kv, config.d),
    'attn_output': (config.d, config.d),
    'ffn_gate': (config.ffn, config.d),
    'ffn_up': (config.ffn, config.d),
    'ffn_down': (config.d, config.ffn),
  }
  tensors = {'token_embd.weight': (head, config.vocabulary, config.d)}
  for layer in range(config.layers):
    for name in ('attn_norm', 'ffn_norm'):
      tensors[f'blk.{layer}.{name}.weight'] = ('f32', 1, config.d)
    for name, (N, K) in linear.items():
      tensors[f'blk.{layer}.{name}.weight'] = (type, N, K)
  tensors['output_norm.weight'] = ('f32', 1, config.d)
  tensors['output.weight'] = (head, config.vocabulary, config.d)

  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_name(f'random ternary {type}')
  writer.add_context_length(config.context)
  writer.add_embedding_length(config.d)
  writer.add_block_count(config.layers)
  writer.add_feed_forward_length(config.ffn)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_rope_dimension_count(head_dim)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(config.vocabulary)
  writer.add_file_type(
    {
      'f16': gguf.LlamaFileType.MOSTLY_F16,
      'tq1_0': gguf.LlamaFileType.MOSTLY_TQ1_0,
      'tq2_0': gguf.LlamaFileType.MOSTLY_TQ2_0,
    }[type]
  )
  # The least of a SentencePiece tokeniser that llama.cpp accepts.
  special = ['<unk>', '<s>', '</s>'] + [f'<0x{i:02X}>' for i in range(256)]
  kinds = [gguf.TokenType.UNKNOWN] + 2 * [gguf.TokenType.CONTROL]
  kinds += 256 * [gguf.TokenType.BYTE]
  filler = config.vocabulary - len(special)
  if filler < 0:
    raise ValueError(f'a vocabulary has at least {len(special)} tokens')
  writer.add_tokenizer_model('llama')
  writer.add_token_list(special + [f'w{i}' for i in range(filler)])
  writer.add_token_scores([0.0] * config.vocabulary)
  writer.add_token_types(kinds + filler * [gguf.TokenType.NORMAL])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)

  for name, (kind, N, K) in tensors.items():
    if kind == 'f32':
      writer.add_tensor_info(name, (K,), np.dtype(np.float32), 4 * K)
    else:
      row_bytes = TYPES[kind].row_bytes(K)
      writer.add_tensor_info(
        name,
        (N, K) if kind == 'f16' else (N, row_bytes),
        np.dtype(np.float16 if kind == 'f16' else np.uint8),
        N * row_bytes,
        None if kind == 'f16' else gguf.GGMLQuantizationType(TYPES[kind].id),
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  rng = np.random.default_rng(seed)
  for kind, N, K in tensors.values():
    if kind == 'f32':
      writer.write_tensor_data(np.ones(K, np.float32))
    else:
      data = random_blocks(kind, N, K, rng)
      writer.write_tensor_data(data.view(np.float16) if kind == 'f16' else data)
  writer.close()


def machine() -> str:
  """The processor by its own name and its threads."""
  cpuinfo = Path('/proc/cpuinfo')
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  names = [line.split(': ')[1] for line in lines if 'model name' in line]
  name = (names or [platform.processor() or platform.machine()])[0]
  return f'{name}, {os.cpu_count()} threads'


def resident() -> dict[str, float]:
  """MiB of this process's memory by kind; empty where it is unknown.

  `anonymous` is what is not of a file, and `huge` what of it lies in huge
  pages.
  """
  kinds = {'Anonymous:': 'anonymous_mib', 'AnonHugePages:': 'huge_mib'}
  found = {}
  with contextlib.suppress(OSError):
    for line in Path('/proc/self/smaps_rollup').read_text().splitlines():
      name, number, *_ = line.split()
      if name in kinds:
        found[kinds[name]] = round(int(number) / 1024, 1)
  return found


def involuntary_switches() -> int:
  import resource  # not on every platform

  return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def summary(seconds: list[float]) -> dict[str, float]:
  return {
    'median_ms': round(1e3 * float(np.median(seconds)), 4),
    'min_ms': round(1e3 * min(seconds), 4),
    'max_ms': round(1e3 * max(seconds), 4),
    'calls': len(seconds),
  }


# What follows runs in a process of its own.


def anonymous(size: int, huge: bool) -> np.ndarray:
  """Zeroed bytes in pages of 4 KiB or, as far as there are any, of 2 MiB."""
  memory = mmap.mmap(
    -1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  )
  advice = getattr(mmap, 'MADV_HUGEPAGE' if huge else 'MADV_NOHUGEPAGE', None)
  if advice is not None:
    memory.madvise(advice)
  elif huge:
    raise SystemExit('this platform has no transparent huge pages: --pages 4k')
  array = np.frombuffer(memory, np.uint8)
  start = -array.ctypes.data % HUGE_PAGE
  return array[start : start + size]


class _InitParams(ctypes.Structure):
  _fields_ = (
    ('mem_size', ctypes.c_size_t),
    ('mem_buffer', ctypes.c_void_p),
    ('no_alloc', ctypes.c_bool),
  )


def ggml():
  """ggml's functions out of the libraries that llama-cpp-python ships."""
  import llama_cpp

  folder = Path(llama_cpp.__file__).parent / 'lib'
  libraries = []
  for name in ('ggml-base', 'ggml-cpu'):
    paths = sorted(folder.glob(f'*{name}.*'))
    if not paths:
      raise SystemExit(f'{folder} has no library {name}')
    libraries.append(ctypes.CDLL(str(paths[0])))
  base, cpu = libraries
  pointer, size, whole = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
  for library, name, result, *arguments in (
    (base, 'ggml_init', pointer, _InitParams),
    (base, 'ggml_tensor_overhead', size),
    (base, 'ggml_graph_overhead_custom', size, size, ctypes.c_bool),
    (base, 'ggml_new_tensor_2d', pointer, pointer, ctypes.c_int, whole, whole),
    (base, 'ggml_mul_mat', pointer, pointer, pointer, pointer),
    (base, 'ggml_new_graph_custom', pointer, pointer, size, ctypes.c_bool),
    (base, 'ggml_build_forward_expand', None, pointer, pointer),
    (base, 'ggml_backend_cpu_buffer_from_ptr', pointer, pointer, size),
    (base, 'ggml_backend_tensor_alloc', ctypes.c_int, *3 * [pointer]),
    (base, 'ggml_backend_graph_compute', ctypes.c_int, pointer, pointer),
    (cpu, 'ggml_backend_cpu_init', pointer),
    (cpu, 'ggml_backend_cpu_set_n_threads', None, pointer, ctypes.c_int),
  ):
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
  return base, cpu


def run_matmul(
  N: int, K: int, M: int, type: str, pages: str, threads: int,
  cache_bytes: int, seconds: float,
):  # fmt: skip
  """One measurement of y = x W^T: a row of JSON."""
  import gguf

  base, cpu = ggml()
  rng = np.random.default_rng(0)
  block = TYPES[type]
  matrix = random_blocks(type, N, K, rng)
  stride = -(-matrix.nbytes // 64) * 64
  matrices = max(2, -(-cache_bytes // stride))
  # As many products in one graph as need some time, so that the start of a
  # graph is not what is measured: in a model a graph holds hundreds.
  chain = min(matrices, max(1, 16 // M))
  matrices = -(-matrices // chain) * chain
  before = resident()
  weights = anonymous(matrices * stride, pages == 'huge')
  for i in range(matrices):
    weights[i * stride : i * stride + matrix.nbytes] = matrix.ravel()
  after = {key: round(now - before[key], 1) for key, now in resident().items()}
  x = rng.standard_normal((M, K), np.float32)

  nodes = 2 * matrices + 1
  graphs = matrices // chain
  overhead = nodes * base.ggml_tensor_overhead()
  overhead += graphs * base.ggml_graph_overhead_custom(4 * chain, False)
  context = base.ggml_init(_InitParams(overhead + 2**16, None, True))

  def placed(tensor, array):
    buffer = base.ggml_backend_cpu_buffer_from_ptr(
      array.ctypes.data, array.nbytes
    )
    failed = base.ggml_backend_tensor_alloc(buffer, tensor, array.ctypes.data)
    if failed:
      raise RuntimeError(f'ggml did not place a tensor: status {failed}')
    return tensor

  # ggml wants 32-byte alignment, which NumPy does not promise.
  x_at = anonymous(x.nbytes, False).view(np.float32).reshape(x.shape)
  x_at[:] = x
  y = anonymous(4 * M * N, False).view(np.float32).reshape(M, N)
  f32 = 0
  inputs = placed(base.ggml_new_tensor_2d(context, f32, K, M), x_at)
  ready = []
  for first in range(0, matrices, chain):
    graph = base.ggml_new_graph_custom(context, 4 * chain, False)
    for i in range(first, first + chain):
      w = base.ggml_new_tensor_2d(context, block.id, K, N)
      placed(w, weights[i * stride : i * stride + matrix.nbytes])
      product = base.ggml_mul_mat(context, w, inputs)
      base.ggml_build_forward_expand(graph, placed(product, y))
    ready.append(graph)
  backend = cpu.ggml_backend_cpu_init()
  cpu.ggml_backend_cpu_set_n_threads(backend, threads)

  def compute(graph) -> float:
    start = time.perf_counter()
    failed = base.ggml_backend_graph_compute(backend, graph)
    spent = time.perf_counter() - start
    if failed:
      raise RuntimeError(f'ggml did not compute: status {failed}')
    return spent / chain

  # The right answer, then one turn of all weights, or a second, as warm-up.
  compute(ready[0])
  rows = min(N, 64)
  kind = gguf.GGMLQuantizationType(block.id)
  data = matrix[:rows].view(np.float16) if type == 'f16' else matrix[:rows]
  dense = gguf.quants.dequantize(data, kind).astype(np.float32)
  wanted = x @ dense.T
  error = np.linalg.norm(y[:, :rows] - wanted) / np.linalg.norm(wanted)
  if not error < 0.02:
    raise RuntimeError(f'ggml computed something else: relative error {error}')
  end = time.perf_counter() + 1
  for graph in ready:
    compute(graph)
    if time.perf_counter() > end:
      break
  switches = involuntary_switches()
  spent, turn = [], 0
  end = time.perf_counter() + seconds
  while len(spent) < 5 or time.perf_counter() < end:
    spent.append(compute(ready[turn % len(ready)]))
    turn += 1
  median = float(np.median(spent))
  return {
    'name': f'llama.cpp {type}', 'N': N, 'K': K, 'M': M, 'pages': pages,
    'threads': threads, **summary(spent), 'matmuls_a_call': chain,
    'weights_gb_per_s': round(matrix.nbytes / median / 1e9, 3),
    'gop_per_s': round(2 * N * K * M / median / 1e9, 1),
    'bits_a_weight': round(8 * matrix.nbytes / (N * K), 4),
    'distinct_mib': round(weights.nbytes / 2**20, 1), **after,
    'relative_error': round(float(error), 5),
    'switches': involuntary_switches() - switches,
  }  # fmt: skip


def filled(structure: ctypes.Structure, **values) -> ctypes.Structure:
  """Sets fields; ctypes itself would take any name and pass nothing on."""
  known = {name for name, *_ in structure._fields_}
  if values.keys() - known:
    raise SystemExit(
      f'this llama-cpp-python has no {sorted(values.keys() - known)} in '
      f'{type(structure).__name__}'
    )
  for name, value in values.items():
    setattr(structure, name, value)
  return structure


def run_decode(
  model: str, pages: str, threads: int, position: int, batch: int,
  prefill: int, tokens: int, repeats: int,
):  # fmt: skip
  """Prefill, or decoding from one position on: a row of JSON.

  Args:
    model: a GGUF file.
    pages: 'mmap' as the file is mapped, 'malloc' as it is read.
    threads: of llama.cpp.
    position: where decoding starts; 0 times prefill alone.
    batch: sequences decoded at once, each with keys and values of its own.
    prefill: tokens of the prompt that is timed, if position is 0.
    tokens: steps to decode in a repetition.
    repeats: repetitions; the first that is run is not counted.
  """
  import llama_cpp as api

  quiet = api.llama_log_callback(lambda *_: None)
  api.llama_log_set(quiet, ctypes.c_void_p(0))
  api.llama_backend_init()
  modes = {
    'mmap': api.LLAMA_LOAD_MODE_MMAP,
    'malloc': api.LLAMA_LOAD_MODE_NONE,
  }
  options = filled(api.llama_model_default_params(), load_mode=modes[pages])
  loaded = api.llama_model_load_from_file(model.encode(), options)
  if not loaded:
    raise SystemExit(f'llama.cpp did not load {model}')
  length = (position + tokens if position else prefill) + 1
  context_options = filled(
    api.llama_context_default_params(),
    n_ctx=batch * (-(-length // 256) * 256), n_batch=512, n_ubatch=512,
    n_seq_max=batch, kv_unified=False, n_threads=threads,
    n_threads_batch=threads, no_perf=True,
  )  # fmt: skip
  context = api.llama_init_from_model(loaded, context_options)
  if not context:
    raise SystemExit('llama.cpp made no context')
  memory = api.llama_get_memory(context)
  vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
  rng = np.random.default_rng(0)
  space = api.llama_batch_init(512, 0, 1)

  def step(where: list[tuple[int, int]]) -> float:
    """Seconds for random tokens at (sequence, position); the last's logits."""
    space.n_tokens = len(where)
    random = rng.integers(259, vocabulary, len(where)).tolist()
    last = {sequence: i for i, (sequence, _) in enumerate(where)}
    for i, (sequence, at) in enumerate(where):
      space.token[i] = random[i]
      space.pos[i] = at
      space.n_seq_id[i] = 1
      space.seq_id[i][0] = sequence
      space.logits[i] = last[sequence] == i
    start = time.perf_counter()
    failed = api.llama_decode(context, space)
    api.llama_synchronize(context)
    spent = time.perf_counter() - start
    if failed:
      raise RuntimeError(f'llama.cpp did not decode: status {failed}')
    return spent

  def prompt(sequence: int, length: int) -> float:
    return sum(
      step([(sequence, at) for at in range(i, min(i + 512, length))])
      for i in range(0, length, 512)
    )

  spent = []
  if position:
    prompt(0, position)
    for sequence in range(1, batch):
      api.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
  for repeat in range(repeats + 1):
    if repeat == 1:
      switches = involuntary_switches()
    if not position:
      api.llama_memory_clear(memory, False)
      seconds = [prompt(0, prefill)]
    else:
      seconds = []
      for at in range(position, position + tokens):
        seconds.append(step([(sequence, at) for sequence in range(batch)]))
      for sequence in range(batch):
        api.llama_memory_seq_rm(memory, sequence, position, -1)
    spent += seconds if repeat else []
  logits = np.ctypeslib.as_array(
    api.llama_get_logits_ith(context, -1), (vocabulary,)
  )
  if not np.isfinite(logits).all():
    raise RuntimeError('the model computes something that is not finite')
  median = float(np.median(spent))
  size = api.llama_model_size(loaded)
  return {
    'name': 'llama.cpp decode' if position else 'llama.cpp prefill',
    'model': Path(model).name, 'weights_mib': round(size / 2**20, 1),
    'pages': pages, **resident(), 'threads': threads,
    **({'position': position, 'batch': batch} if position
       else {'prompt': prefill}),
    **summary(spent),
    'tokens_per_s': round((batch if position else prefill) / median, 2),
    'switches': involuntary_switches() - switches,
  }  # fmt: skip


def run_versions():
  import llama_cpp as api

  return {'llama.cpp': api.llama_print_system_info().decode().strip()}


JOBS = {
  'matmul': run_matmul,
  'decode': run_decode,
  'versions': run_versions,
}


def child(job: str, huge_malloc: bool = False, **arguments) -> dict:
  """A job's result, computed in a fresh process.

  Args:
    job: a name in JOBS.
    huge_malloc: whether its malloc asks for huge pages.
    **arguments: the job's.
  """
  require_extra()
  environment = dict(os.environ)
  if huge_malloc:
    given = environment.get('GLIBC_TUNABLES')
    environment['GLIBC_TUNABLES'] = ':'.join(
      filter(None, [given, 'glibc.malloc.hugetlb=1'])
    )
  # -P: this file would pass for the package llama_cpp if its folder were
  # looked into.
  done = subprocess.run(
    [sys.executable, '-P', __file__, 'child', json.dumps([job, arguments])],
    env=environment, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  if done.returncode:
    raise SystemExit(f'{job} {arguments} ended with status {done.returncode}')
  return json.loads(done.stdout.splitlines()[-1])


def matmul(
  N: int,
  K: int,
  M: int,
  type: str = 'tq2_0',
  pages: str = 'huge',
  threads: int = 2,
  cache_bytes: int = CACHE_BYTES,
  seconds: float = 3,
) -> dict:
  """Times x [M, K] times a random matrix [N, K], in a fresh process.

  Args:
    N: outputs.
    K: inputs.
    M: rows of x.
    type: a name in TERNARY.
    pages: '4k' or 'huge', of the weights.
    threads: of ggml.
    cache_bytes: the bytes of the distinct matrices that take turns.
    seconds: for how long to measure; at least five calls are timed.

  Returns:
    A row of JSON.
  """
  return child(
    'matmul', N=N, K=K, M=M, type=type, pages=pages, threads=threads,
    cache_bytes=cache_bytes, seconds=seconds,
  )  # fmt: skip


def decode(
  model: str | Path,
  pages: str = 'mmap',
  threads: int = 2,
  position: int = 64,
  batch: int = 1,
  prefill: int = 512,
  tokens: int = 24,
  repeats: int = 3,
) -> dict:
  """Times a model's decoding or prefill in a fresh process; see run_decode.

  `pages` may also be 'huge': read, by a malloc that asks for huge pages.
  """
  result = child(
    'decode', huge_malloc=pages == 'huge', model=str(model),
    pages='mmap' if pages == 'mmap' else 'malloc', threads=threads,
    position=position, batch=batch, prefill=prefill, tokens=tokens,
    repeats=repeats,
  )  # fmt: skip
  return result | {'pages': pages}


def header() -> dict:
  """Command, machine, date and versions."""
  return {
    'command': ' '.join(sys.argv),
    'date': datetime.date.today().isoformat(),
    'machine': machine(),
    'load_average': os.getloadavg()[0],
    'python': platform.python_version(),
    'numpy': np.__version__,
    **require_extra(),
    **child('versions'),
  }


def parser() -> argparse.ArgumentParser:
  result = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  commands = result.add_subparsers(dest='command', required=True)
  write = commands.add_parser('model', help='write a random model')
  write.add_argument('path', type=Path)
  write.add_argument('--head', choices=('q6_k', 'f16'), default='q6_k')
  one = commands.add_parser('matmul', help='time a product')
  one.add_argument(
    '--shape', nargs=2, type=int, action='append', metavar=('N', 'K'),
    required=True,
  )  # fmt: skip
  one.add_argument('--m', nargs='+', type=int, default=[1, 8, 128])
  one.add_argument('--pages', nargs='+', choices=('huge', '4k'),
                   default=['huge'])  # fmt: skip
  one.add_argument('--seconds', type=float, default=3)
  one.add_argument('--mib', type=int, default=CACHE_BYTES // 2**20,
                   help='distinct weights that take turns')  # fmt: skip
  whole = commands.add_parser('decode', help='time a model end to end')
  whole.add_argument('--model', type=Path, help='default: a random one')
  whole.add_argument('--position', nargs='+', type=int, default=[64, 960])
  whole.add_argument('--batch', nargs='+', type=int, default=[1, 8])
  whole.add_argument('--prefill', type=int, default=512, help='0: none')
  whole.add_argument('--tokens', type=int, default=24)
  whole.add_argument('--repeats', type=int, default=3)
  whole.add_argument('--pages', nargs='+', choices=('mmap', 'malloc', 'huge'),
                     default=['mmap', 'huge'])  # fmt: skip
  for command in (write, whole):
    for field in dataclasses.fields(Config):
      name = '--' + field.name.replace('_', '-')
      command.add_argument(name, type=int, default=field.default)
  for command in (write, one, whole):
    command.add_argument('--type', choices=TERNARY, default='tq2_0')
  for command in (one, whole):
    command.add_argument('--threads', type=int, default=os.cpu_count())
  return result


def main():
  options = parser().parse_args()
  if options.command != 'matmul':
    config = Config(
      **{f.name: getattr(options, f.name) for f in dataclasses.fields(Config)}
    )
  if options.command == 'model':
    random_model(options.path, config, options.type, options.head)
    return
  require_extra()

  def tell(row: dict):
    print(json.dumps(row), flush=True)

  tell(header())
  if options.command == 'matmul':
    for N, K in options.shape:
      for M in options.m:
        for pages in options.pages:
          tell(
            matmul(
              N, K, M, options.type, pages, options.threads,
              options.mib * 2**20, options.seconds,
            )
          )  # fmt: skip
    return
  with tempfile.TemporaryDirectory() as folder:
    model = options.model
    if model is None:
      model = Path(folder) / f'random-{options.type}.gguf'
      random_model(model, config, options.type)
    for pages in options.pages:
      common = {'model': model, 'pages': pages, 'threads': options.threads}
      if options.prefill:
        tell(decode(
          **common, position=0, prefill=options.prefill,
          repeats=options.repeats,
        ))  # fmt: skip
      for batch in options.batch:
        for position in options.position:
          tell(decode(
            **common, position=position, batch=batch, tokens=options.tokens,
            repeats=options.repeats,
          ))  # fmt: skip


if __name__ == '__main__':
  if sys.argv[1:2] == ['child']:
    job, arguments = json.loads(sys.argv[2])
    print(json.dumps(JOBS[job](**arguments)))
  else:
    main()
