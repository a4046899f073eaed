# SPDX-License-Identifier: Apache-2.0
"""Prompts in, continued texts out: arguments, a pipe, or a dialogue."""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Protocol, runtime_checkable

from tritera_jax.generate import load
from tritera_jax.generate.load import Loaded
from tritera_jax.generate.sampling import Sampling


@runtime_checkable
class Input(Protocol):
  """The part of sys.stdin that is used."""

  def isatty(self) -> bool: ...
  def read(self) -> str: ...
  def readline(self) -> str: ...


def run(
  loaded: Loaded,
  prompts: Sequence[str],
  *,
  stdin: Input,
  write: Callable[[str], object],
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
      write(f'{prompt}{text}\n')
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
    dialogue(pieces, stdin=stdin, write=write)
  else:
    [prompt] = prompts or [stdin.read()]
    _write(pieces, prompt, write)


def dialogue(
  pieces: Callable[[str], Iterator[str]],
  *,
  stdin: Input,
  write: Callable[[str], object],
):
  """Continues each line of `stdin`, until an empty one or its end.

  Args:
    pieces: the continuation of a prompt, in pieces.
    stdin: KeyboardInterrupt while it is read brings the next line.
    write: shows a text at once; KeyboardInterrupt ends the continuation.
  """
  while True:
    try:
      write('> ')
      line = stdin.readline()
      prompt = line.removesuffix('\n')
      if not prompt:
        if not line:  # Ctrl-D leaves the cursor behind the sign
          write('\n')
        return
      _write(pieces, prompt, write)
    except KeyboardInterrupt:
      write('\n')


def _write(
  pieces: Callable[[str], Iterator[str]],
  prompt: str,
  write: Callable[[str], object],
):
  continuation = pieces(prompt)  # what is refused writes nothing
  write(prompt)
  for piece in continuation:
    write(piece)
  write('\n')
