# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels: a shared library that XLA calls through its FFI."""

import ctypes
import functools
import os
from pathlib import Path
import re

import jax

PATH = Path(__file__).with_name('libtritera.so')
INSTRUCTION_SETS = (
  'amx',
  'avx512',
  'avx2',
  'neon_i8mm',
  'neon',
  'portable',
)
FORMATS = {'two_bit': 0, 'base_three': 1, 'byte': 2}  # enum Format, kernel.h
GATES = {'silu': 0, 'relu2': 1}  # enum Gate, ops.h
TARGETS = (
  'tritera_matmul',
  'tritera_norm_matmul',
  'tritera_matmul_add',
  'tritera_gated_matmul_add',
  'tritera_attention',
  'tritera_decoder_layers',
)


class Missing(RuntimeError):
  """The library cannot serve; the message says why, and what to do."""


@functools.cache
def load() -> ctypes.CDLL:
  """The library, its handlers registered with XLA.

  Raises:
    Missing: it was not built, was built for another XLA, or TRITERA_CPU names
      an instruction set that this machine lacks.
  """
  if not PATH.exists():
    raise Missing(
      f'{PATH.name} was not built; install a C++17 compiler (g++ or clang++) '
      'and install tritera_jax again'
    )
  library = ctypes.CDLL(str(PATH))
  library.tritera_kernel.restype = ctypes.c_char_p
  library.tritera_select.argtypes = [ctypes.c_char_p]
  library.tritera_select.restype = ctypes.c_bool
  # XLA refuses a newer library by losing its whole CPU backend: ask first.
  built = (library.tritera_ffi_api_major(), library.tritera_ffi_api_minor())
  here = _ffi_version()
  if built[0] != here[0] or built[1] > here[1]:
    raise Missing(
      f'{PATH.name} was built for XLA FFI {built[0]}.{built[1]}, this jaxlib '
      f'has {here[0]}.{here[1]}; install tritera_jax again'
    )
  wanted = os.environ.get('TRITERA_CPU')
  if wanted and not library.tritera_select(wanted.encode()):
    raise Missing(
      f'TRITERA_CPU={wanted!r} is not one of {", ".join(INSTRUCTION_SETS)} '
      'that this machine can run'
    )
  for target in TARGETS:
    jax.ffi.register_ffi_target(
      target, jax.ffi.pycapsule(getattr(library, target)), platform='cpu'
    )
  return library


def why_missing() -> str | None:
  """Why the library cannot serve; None if it can."""
  try:
    load()
  except Missing as error:
    return str(error)
  return None


def instruction_set() -> str:
  """That the kernels use now."""
  return load().tritera_kernel().decode()


def select(name: str):
  """Uses another instruction set from now on, for tests and comparisons.

  Raises:
    ValueError: this machine cannot run it.
  """
  if not load().tritera_select(name.encode()):
    raise ValueError(f'this machine cannot run {name!r}')


def _ffi_version() -> tuple[int, int]:
  header = Path(jax.ffi.include_dir()) / 'xla' / 'ffi' / 'api' / 'c_api.h'
  text = header.read_text()
  major, minor = (
    int(re.search(rf'#define XLA_FFI_API_{part} (\d+)', text)[1])  # pyright: ignore[reportOptionalSubscript]
    for part in ('MAJOR', 'MINOR')
  )
  return major, minor


def read_gb_per_s(
  *, gib: float = 1.0, threads: int, huge_pages: bool, passes: int = 7
) -> list[float]:
  """How fast memory is read, in 10^9 bytes a second: the passes, sorted.

  Raises:
    MemoryError: there is none of that size.
  """
  library = load()
  size = int(gib * 2**30) // 2**12 * 2**12
  seconds = (ctypes.c_double * passes)()
  library.tritera_read_seconds.argtypes = [
    ctypes.c_size_t, ctypes.c_int, ctypes.c_bool, ctypes.c_int,
    ctypes.POINTER(ctypes.c_double),
  ]  # fmt: skip
  library.tritera_read_seconds.restype = ctypes.c_bool
  if not library.tritera_read_seconds(
    size, threads, huge_pages, passes, seconds
  ):
    raise MemoryError(f'no {gib} GiB to measure with')
  return sorted(size / s / 1e9 for s in seconds)
