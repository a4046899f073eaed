# SPDX-License-Identifier: Apache-2.0
"""Times a whole packed model of random weights: reading and writing tokens.

  python kernels/bench/decode.py [--model M] [--format F] [--activations A]
    [--head H] [--cache C] [--dense] [--text IN OUT] [--smoke]

A line of JSON for each batch size and position: the time of a token in a loop
inside jit, tokens a second over all rows, and gigabytes of weights a second;
then one for reading a prompt, and one for --text: the time to the first token,
tokens a second after it, and the part of the memory's speed that they use.
--dense does all of it for the same model in bfloat16, too. Machine, date,
versions and command come first. The default model has the shape of a 1.1B
Llama: 242 MB of two-bit weights.
"""

import argparse
import json
import math
import os
import time

import dense_decoder
import jax
import jax.numpy as jnp
import numpy as np
import record

from tritera_jax.checkpoint import packed_file
from tritera_jax.generate import engine, launch
from tritera_jax.generate import packed as packed_decoder
from tritera_jax.model.config import ModelConfig
from tritera_kernels import arena, packed
from tritera_kernels.cpu import library
from tritera_kernels.matmul import ACTIVATIONS, Activations


def _config(D: int, F: int, H: int, G: int, h: int, L: int, V: int, **fields):
  return ModelConfig(
    family='ternary',
    vocab_size=V,
    layers=L,
    d_model=D,
    d_ff=F,
    heads=H,
    kv_heads=G,
    head_dim=h,
    context_length=2048,
    **fields,
  )


CONFIGS = {
  '1.1b': _config(2048, 5632, 32, 4, 64, 22, 32_000),
  'trilm_3.9b': _config(3072, 9216, 24, 24, 128, 30, 50_277),
  'llama_7b': _config(4096, 11008, 32, 32, 128, 32, 32_000),
  'bitnet_2b': _config(
    2560, 6912, 20, 5, 128, 30, 128_256,
    sub_norm=True, mlp_activation='relu2', activation_bits=8, rope_theta=5e5,
  ),
}  # fmt: skip
SMOKE = ModelConfig(
  family='ternary',
  vocab_size=128,
  layers=2,
  d_model=32,
  d_ff=48,
  heads=2,
  kv_heads=1,
  head_dim=16,
  context_length=2048,
)
NO_TOKEN = -1  # a stop that never comes


def random_packed_model(
  config: ModelConfig,
  format: str,
  head: packed_file.Head,
  seed: int = 0,
  *,
  huge_pages: bool = True,
  activations: Activations = 'int8',
) -> packed_file.PackedModel:
  """A model of random valid bytes, in memory as a file's would lie.

  Scales keep the residual stream near one. There is no fingerprint.
  """
  rng = np.random.default_rng(seed)
  tensors = packed_file.new_arrays(
    packed_file.tensor_shapes(config, format, head), huge_pages=huge_pages
  )
  valid, codes = packed.byte_tables(format)
  table = bytes(valid[i * len(valid) // 256] for i in range(256))
  zero = next(byte for byte in valid if not codes[byte].any())
  weight = bytes(max(i, 1) for i in range(256))
  for name, array in tensors.items():
    matrix = name.removesuffix('.packed').removesuffix('.scale')
    spec = config.linears.get(matrix.split('.', 2)[-1])
    inputs = config.d_model if spec is None else spec.in_features
    if name.endswith('.packed'):
      lookup = weight if spec is None else table
      drawn = rng.bytes(array.size).translate(lookup)
      array[:] = np.frombuffer(drawn, np.uint8).reshape(array.shape)
      if spec is not None:
        segments = config.scale_blocks if spec.scale_axis == 'in' else 1
        start = packed.filler_start(format, spec.in_features, segments)
        array.reshape(len(array), segments, -1)[..., start:] = zero
    elif name.endswith('.scale'):
      array[:] = 1 / math.sqrt(inputs) / (127 if spec is None else 1)
    elif array.ndim == 2:
      array[:] = rng.standard_normal(array.shape, np.float32)
      array /= math.sqrt(inputs)
    else:
      array[:] = 1
  return packed_file.assemble(
    config, format, activations, arena.on_device(tensors), proof=''
  )


def decode_seconds(model, rows: int, position: int, tokens: int, calls: int):
  """Seconds a token of each call, from `position` on."""
  rng = np.random.default_rng(0)
  prompts = rng.integers(0, model.config.vocab_size, (rows, position)).tolist()
  decoding = engine.Decoding(
    model, prompts, new_tokens=1 + (calls + 1) * tokens, stop=NO_TOKEN
  )
  decoding.advance(1 + tokens)
  seconds = []
  for _ in range(calls):
    start = time.perf_counter()
    decoding.advance(tokens)
    seconds.append((time.perf_counter() - start) / tokens)
  return seconds


def prefill_seconds(model, length: int, calls: int):
  """Seconds of reading a prompt and choosing the first token."""
  rng = np.random.default_rng(0)
  seconds = []
  for _ in range(calls + 1):
    prompt = rng.integers(0, model.config.vocab_size, length).tolist()
    start = time.perf_counter()
    engine.generate(model, [prompt], new_tokens=1, stop=NO_TOKEN)
    seconds.append(time.perf_counter() - start)
  return seconds[1:]


def text_seconds(model, prompt: int, tokens: int, calls: int):
  """Seconds to the first token, and of all that follow, of each call."""
  rng = np.random.default_rng(0)
  ids = rng.integers(0, model.config.vocab_size, prompt).tolist()
  first, rest = [], []
  for _ in range(calls + 1):
    start = time.perf_counter()
    decoding = engine.Decoding(model, [ids], new_tokens=tokens, stop=NO_TOKEN)
    decoding.advance(1)
    begun = time.perf_counter()
    decoding.advance(tokens - 1)
    first.append(begun - start)
    rest.append(time.perf_counter() - begun)
  return first[1:], rest[1:]


def memory_gb_per_s(gib: float) -> float:
  """How fast this machine reads memory: the median."""
  if jax.default_backend() == 'cpu':
    threads = os.cpu_count() or 1
    return float(
      np.median(
        library.read_gb_per_s(gib=gib, threads=threads, huge_pages=True)
      )
    )
  array = jnp.ones((int(gib * 2**10), 2**18), jnp.float32)
  largest, seconds = jax.jit(lambda a: jnp.max(a, axis=1)), []
  for _ in range(8):
    start = time.perf_counter()
    largest(array).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return array.nbytes / float(np.median(seconds[1:])) / 1e9


def rows_of(name: str, model, options, gb_per_s: float):
  """What was timed of a model, a line each."""
  streamed = streamed_bytes(model)
  yield {'model': name, 'streamed_bytes': streamed}
  for rows in options.rows:
    for position in options.positions:
      seconds = decode_seconds(
        model, rows, position, options.tokens, options.calls
      )
      median = float(np.median(seconds))
      yield {
        'model': name,
        'name': 'decode',
        'rows': rows,
        'position': position,
        **record.spread(seconds),
        'tokens_per_s': round(rows / median, 2),
        'weights_gb_per_s': round(streamed / median / 1e9, 2),
      }
  if options.prompt:
    seconds = prefill_seconds(model, options.prompt, options.calls)
    yield {
      'model': name,
      'name': 'prefill',
      'rows': 1,
      'length': options.prompt,
      **record.spread(seconds),
      'tokens_per_s': round(options.prompt / float(np.median(seconds)), 2),
    }
  if options.text:
    prompt, tokens = options.text
    first, rest = text_seconds(model, prompt, tokens, options.calls)
    a_token = float(np.median(rest)) / (tokens - 1)
    floor = text_bytes(model, prompt, tokens) / gb_per_s / 1e9
    yield {
      'model': name,
      'name': 'text',
      'rows': 1,
      'prompt': prompt,
      'tokens': tokens,
      **record.spread(rest),
      'first_token_ms': round(1e3 * float(np.median(first)), 3),
      'tokens_per_s': round(1 / a_token, 2),
      'memory_gb_per_s': round(gb_per_s, 1),
      'percent_of_memory': round(100 * floor / a_token, 1),
    }


def streamed_bytes(model) -> int:
  """Of weights, for a token; the embedding is looked up, not streamed."""
  leaves = jax.tree.leaves((model.layers, model.head))
  return sum(leaf.nbytes for leaf in leaves)


def text_bytes(model, prompt: int, tokens: int) -> float:
  """Read for a token of a text: weights, and half of its keys and values."""
  cache = jax.eval_shape(lambda: model.empty_cache(1, prompt + tokens))
  nbytes = sum(
    leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)
  )
  # Keys and values are read up to the token: on average, half the way.
  read = nbytes / cache[0].slots
  return streamed_bytes(model) + read * (prompt + tokens / 2)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--model', default='1.1b', choices=CONFIGS)
  parser.add_argument('--format', default='two_bit')
  parser.add_argument('--activations', default='int8', choices=ACTIVATIONS)
  parser.add_argument('--head', default='int8', choices=['int8', 'float'])
  parser.add_argument('--cache', default='bfloat16')
  parser.add_argument('--pages', default='huge', choices=['huge', '4k'])
  parser.add_argument('--dense', action='store_true', help='bfloat16, too')
  parser.add_argument('--rows', nargs='*', type=int, default=[1, 8])
  parser.add_argument('--positions', nargs='+', type=int, default=[64, 960])
  parser.add_argument('--prompt', type=int, default=512, help='0: none')
  parser.add_argument(
    '--text', nargs=2, type=int, metavar=('IN', 'OUT'), help='say 128 256'
  )
  parser.add_argument(
    '--gb-per-s', type=float, help='of memory; default: measured here'
  )
  parser.add_argument('--tokens', type=int, default=24, help='a timed call')
  parser.add_argument('--calls', type=int, default=5)
  parser.add_argument('--smoke', action='store_true', help='small and quick')
  options = parser.parse_args()
  config, gib = CONFIGS[options.model], 2.0
  if options.smoke:
    config, options.rows, options.positions = SMOKE, [1, 2], [3]
    options.prompt, options.tokens, options.calls = 40, 2, 2
    gib = 2**-6

  launch.set_xla_flags()
  print(json.dumps(record.header()))
  start = time.perf_counter()
  model = packed_decoder.bind(
    random_packed_model(
      config,
      options.format,
      options.head,
      huge_pages=options.pages == 'huge',
      activations=options.activations,
    ),
    cache=options.cache,
  )
  settings = {
    'shape': 'smoke' if options.smoke else options.model,
    'format': options.format,
    'activations': options.activations,
    'head': options.head,
    'cache': options.cache,
    'pages': options.pages,
    'xla_flags': os.environ.get('XLA_FLAGS', ''),
    'seconds_to_make': round(time.perf_counter() - start, 2),
  }
  gb_per_s = options.gb_per_s or (memory_gb_per_s(gib) if options.text else 0)
  for row in rows_of('packed', model, options, gb_per_s):
    print(json.dumps({**settings, **row}), flush=True)
    settings = {}
  if options.dense:
    del model  # the two may not fit beside each other
    dense = dense_decoder.random_dense_model(config, options.cache)
    for row in rows_of('dense bfloat16', dense, options, gb_per_s):
      print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()
