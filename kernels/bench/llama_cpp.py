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
import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys
import tempfile

# Not the first: `llama_cpp` is a package's name, too.
sys.path.append(str(Path(__file__).parent))
from random_gguf import TERNARY, Config, random_model, require_extra

CACHE_BYTES = 2**28
CHILD = Path(__file__).with_name('llama_process.py')


def child(job: str, huge_malloc: bool = False, **arguments) -> dict:
  """A job's result, computed in a fresh process.

  Args:
    job: a name in llama_process.JOBS.
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
    [sys.executable, '-P', str(CHILD), json.dumps([job, arguments])],
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
  """Command, machine, date and versions, of llama.cpp too."""
  import record  # and with it JAX, which a peer's own process goes without

  return record.header() | {
    'load_average': os.getloadavg()[0],
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
  main()
