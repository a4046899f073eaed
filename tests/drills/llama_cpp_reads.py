# SPDX-License-Identifier: Apache-2.0
"""Exports a run to GGUF and has real llama.cpp run it, beside ours.

  python -m tests.drills.llama_cpp_reads RUN [--data FOLDER] [--tokens 16384]

Needs the extra `peers`, which builds llama.cpp (minutes), and a run whose
matrices are whole blocks of 256, such as the quickstart's. For each type: the
blocks are those that ggml's own quantiser makes, the loss on held-out ids in
the same windows is within half a per cent of ours, and llama.cpp cuts a text as
`tokenizer_keys.as_llama_cpp` says it does. Greedy continuations are shown side
by side; llama.cpp rounds activations to int8, so they may part.
"""

import argparse
from collections.abc import Callable, Iterator
import ctypes
import json
from pathlib import Path
import tempfile
from typing import get_args

import numpy as np

from tritera_jax.checkpoint import pack, restore
from tritera_jax.data import loader, shards
from tritera_jax.eval import perplexity
from tritera_jax.generate import load
from tritera_jax.interop.gguf import (
  gguf_file,
  layout,
  tensor_plan,
  to_gguf,
  tokenizer_keys,
)
from tritera_jax.interop.gguf.ggml_blocks import BLOCK_TYPES

PROMPTS = ('def ', 'import os\n', 'class Parser:\n', 'The ')
TEXT = (
  "It'S we'll 1 22 4444 x1y2 _a--b ...\r\n\t \u3000世界 Ünï 😀  It's 2024:\n\n"
  '  for x in  range(12345):\tprint("naïve", x)  \n\n'
)


def ggml_blocks(dense: np.ndarray, type: int, nbytes: int) -> np.ndarray:
  """A matrix as ggml's C quantiser writes it."""
  import llama_cpp

  [library] = (Path(llama_cpp.__file__).parent / 'lib').glob('libggml-base.so')
  quantize = ctypes.CDLL(str(library)).ggml_quantize_chunk
  quantize.restype = ctypes.c_size_t
  whole, pointer = ctypes.c_int64, ctypes.c_void_p
  quantize.argtypes = [ctypes.c_int, pointer, pointer, *3 * [whole], pointer]
  dense = np.ascontiguousarray(dense, np.float32)
  data = np.zeros(nbytes, np.uint8)
  written = quantize(
    type, dense.ctypes.data, data.ctypes.data, 0, *dense.shape, None
  )
  assert written == nbytes, f'ggml wrote {written} bytes, not {nbytes}'
  return data


def check_blocks(file: Path, run: Path) -> int:
  """How many matrices have the bytes that ggml makes of them; all must."""
  experiment, params = restore.restore_params(run)
  config = experiment.model
  read, found = gguf_file.read(file), 0
  matrices = tensor_plan.ternary_matrices(config, params)
  for name, linear, _ in layout.matrices(config):
    _, codes_NK, scale_S, axis = matrices[name]
    along = np.repeat(scale_S, codes_NK.shape[axis == 'in'] // len(scale_S))
    dense_NK = codes_NK * (along[:, None] if axis == 'out' else along)
    there = layout.tensor_name(name)
    rows = read.rows(there)
    made = ggml_blocks(
      dense_NK[layout.row_order(config, linear)],
      gguf_file.TYPE_IDS[read.tensors[there].type],
      rows.nbytes,
    )
    assert made.tobytes() == rows.tobytes(), f'{there} differs from ggml'
    found += 1
  return found


def check_rules(run: Path, tokenizer, folder: Path) -> Iterator[str]:
  """The rules that `tokenizer_keys` has as llama.cpp does; all must."""
  import llama_cpp

  for pre in get_args(tokenizer_keys.Pre):
    file = folder / f'{pre}.gguf'
    to_gguf.export(run, file, types='q2_0', pre=pre)
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    found = model.tokenize(TEXT.encode(), add_bos=False, special=False)
    wanted = tokenizer_keys.as_llama_cpp(tokenizer, pre).encode(TEXT).ids
    assert found == wanted, f'{pre}: {found}, not {wanted}'
    yield pre


def ours(model) -> Callable[[np.ndarray], np.ndarray]:
  import jax

  compute = jax.jit(lambda tokens_BT: model(tokens_BT)[0])
  return lambda ids: np.asarray(compute(ids[None])[0])


def theirs(file: Path, context: int):
  """llama.cpp's logits of a row of ids, and what loaded them."""
  import llama_cpp

  model = llama_cpp.Llama(
    str(file), n_ctx=context, n_batch=context, n_threads=2, logits_all=True,
    verbose=False,
  )  # fmt: skip

  def logits(ids: np.ndarray) -> np.ndarray:
    model.reset()
    model.eval(ids.tolist())
    return np.array(model.scores[: len(ids)])

  return logits, model


def losses(windows, logits: Callable[[np.ndarray], np.ndarray]):
  """Nats of every scored target, and the likeliest ids."""
  nats, first = [], []
  for inputs, targets, weights in zip(*windows, strict=True):
    rows = logits(inputs).astype(np.float64)[weights > 0]
    top = rows.max(axis=1)
    logsum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
    scored = targets[weights > 0]
    nats.append(logsum - rows[np.arange(len(rows)), scored])
    first.append(rows.argmax(axis=1))
  return np.concatenate(nats), np.concatenate(first)


def greedy(model, ids: list[int], tokens: int) -> list[int]:
  model.reset()
  model.eval(ids)
  found = []
  for _ in range(tokens):
    found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(found[-1:])
  return found


def drill(
  run: Path, data: Path, folder: Path, tokens: int = 2**14
) -> Iterator[dict]:
  """A row for ours, for our packed int8 path, and for each type."""
  loaded = load.load(run)
  context = loaded.model.config.context_length
  source = shards.open_split(data, 'validation')
  windows = loader.windows(source, context, context, tokens)
  reference, likeliest = losses(windows, ours(loaded.model))
  scored = len(reference)
  yield {'model': 'latents', 'tokens': scored, 'nats': reference.mean()}
  packed = run / 'packed' / 'two_bit'
  if not packed.exists():
    pack.pack(run, 'two_bit')
  int8 = load.load(packed, activations='int8').model
  nats = perplexity.head_loss(
    int8, source, tokens=tokens, sequence_length=context, stride=context
  )
  yield {'model': 'packed, int8 activations', 'nats': nats}
  yield {'text cut alike': [*check_rules(run, loaded.tokenizer, folder)]}
  pre = tokenizer_keys.exact_rule(loaded.tokenizer) or 'llama-bpe'
  wanted = {
    prompt: load.complete(loaded, prompt, new_tokens=24) for prompt in PROMPTS
  }
  for type in (*BLOCK_TYPES, 'f16'):
    file = folder / f'{type}.gguf'
    report = to_gguf.export(run, file, types=type, pre=pre)
    row = {'model': f'llama.cpp {type}', 'bytes': report.bytes}
    if type in BLOCK_TYPES:
      row['matrices with the bytes of ggml'] = check_blocks(file, run)
    logits, model = theirs(file, context)
    nats, first = losses(windows, logits)
    ratio = np.exp(nats.mean() - reference.mean())
    row |= {
      'nats': nats.mean(),
      'perplexity over ours': ratio,
      'same likeliest token': (first == likeliest).mean(),
    }
    same = {}
    for prompt in PROMPTS:
      ids = greedy(model, loaded.tokenizer.encode(prompt).ids, 24)
      text = loaded.tokenizer.decode(ids)
      same[prompt] = (
        'equal' if text == wanted[prompt] else [wanted[prompt], text]
      )
    row['greedy continuations'] = same
    yield row
    assert abs(ratio - 1) < 0.005, f'perplexity over ours is {ratio}'


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('run', type=Path)
  parser.add_argument('--data', type=Path, help="default: the run's dataset")
  parser.add_argument('--tokens', type=int, default=2**14)
  options = parser.parse_args()
  data = options.data or Path(perplexity.default_data(options.run))
  with tempfile.TemporaryDirectory() as folder:
    for row in drill(options.run, data, Path(folder), options.tokens):
      print(json.dumps(row, default=float, ensure_ascii=False), flush=True)


if __name__ == '__main__':
  main()
