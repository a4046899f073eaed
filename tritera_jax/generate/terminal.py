# SPDX-License-Identifier: Apache-2.0
"""Prompts in, continued texts out: arguments, a pipe, or a dialogue."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import TextIO

from tritera_jax.generate import load
from tritera_jax.generate.load import Loaded
from tritera_jax.generate.sampling import Sampling


def run(
  loaded: Loaded,
  prompts: Sequence[str],
  *,
  stdin: TextIO,
  stdout: TextIO,
  new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[str] = (),
):
  """Writes each prompt with its continuation.

  One prompt is written as it is continued; several are continued as one
  batch. Without any, the prompt is all of `stdin`, or if that is a terminal,
  each line that is typed.
  """
  if len(prompts) > 1:
    texts = load.complete_all(
      loaded,
      prompts,
      new_tokens=new_tokens,
      sampling=sampling,
      seed=seed,
      stop=stop,
    )
    for prompt, text in zip(prompts, texts, strict=True):
      print(prompt + text, file=stdout)
    return
  pieces = functools.partial(
    load.stream,
    loaded,
    new_tokens=new_tokens,
    sampling=sampling,
    seed=seed,
    stop=stop,
  )
  if not prompts and stdin.isatty():
    dialogue(pieces, stdin=stdin, stdout=stdout)
  else:
    [prompt] = prompts or [stdin.read()]
    _write(pieces, prompt, stdout)


def dialogue(
  pieces: Callable[[str], Iterator[str]], *, stdin: TextIO, stdout: TextIO
):
  """Continues each line of `stdin`, until an empty one or its end.

  Args:
    pieces: the continuation of a prompt, in pieces.
    stdin: KeyboardInterrupt while it is read brings the next line.
    stdout: KeyboardInterrupt while it is written to ends the continuation.
  """
  while True:
    try:
      print('> ', end='', flush=True, file=stdout)
      line = stdin.readline()
      prompt = line.removesuffix('\n')
      if not prompt:
        if not line:  # Ctrl-D leaves the cursor behind the sign
          print(file=stdout)
        return
      _write(pieces, prompt, stdout)
    except KeyboardInterrupt:
      print(file=stdout)


def _write(pieces: Callable[[str], Iterator[str]], prompt: str, stdout: TextIO):
  write = functools.partial(print, end='', flush=True, file=stdout)
  write(prompt)
  for piece in pieces(prompt):
    write(piece)
  write('\n')
