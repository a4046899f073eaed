# SPDX-License-Identifier: Apache-2.0
"""A model to use, from a run folder or a packed one, and what it writes."""

from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import tokenizers

from tritera_jax.checkpoint import packed_file, restore
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.generate import engine, packed, stopping
from tritera_jax.generate.sampling import Sampling
from tritera_jax.model import decoder, quantized
from tritera_jax.model.interface import LanguageModel
from tritera_kernels.fused import CacheType
from tritera_kernels.matmul import Activations

_PIECE = 8  # tokens decoded between two looks at the text


class Loaded(NamedTuple):
  """`folder`, of the tokenizer, may say which token ends a document."""

  model: LanguageModel
  tokenizer: tokenizers.Tokenizer
  folder: Path | None = None

  @property
  def end_of_text(self) -> int:
    """See `data.tokenizer.end_of_text_id`."""
    return tokenizer_lib.end_of_text_id(self.tokenizer, self.folder)


def load(
  path: str | Path,
  *,
  step: int | None = None,
  activations: Activations | None = None,
  cache: CacheType | None = None,
  format: str | None = None,
) -> Loaded:
  """Model and tokenizer of a run folder or a packed folder.

  Args:
    path: a run's folder (its latents are quantised once), or a packed one.
    step: of a run: which checkpoint; default: the newest.
    activations: of a packed model: 'float', 'bfloat16' or 'int8'; default: its
      record's.
    cache: of a packed model, what keys and values are rounded to: 'bfloat16'
      (the default), 'int8', or 'float32', which no fast kernel reads.
    format: of a packed model, what it is repacked to; default: its own.

  Raises:
    FileNotFoundError: neither kind of folder, or no such checkpoint.
    ValueError: damaged or unfit content, or an argument of the other kind.
  """
  path = Path(path)
  if (path / 'config.json').exists():
    raise ValueError(
      f'{path} is a Hugging Face checkpoint: tritera import {path} --out RUN '
      'makes a run of it'
    )
  if not any(
    (path / name).is_file() for name in ('experiment.json', 'model.safetensors')
  ):
    raise FileNotFoundError(
      f'no run or packed folder at {path}; tritera import makes a run of a '
      'Hugging Face checkpoint'
    )
  tokenizer = tokenizer_lib.load_tokenizer(path / 'tokenizer.json')
  if (path / 'model.safetensors').exists():
    if step is not None:
      raise ValueError(f'step={step}, but {path} is packed: it has no steps')
    model = packed.bind(
      packed_file.read(path), activations, cache, format=format
    )
    return Loaded(model, tokenizer, path)
  for name, value in (
    ('activations', activations),
    ('cache', cache),
    ('format', format),
  ):
    if value is not None:
      raise ValueError(
        f'{name}={value!r} is for packed models; pack {path} first'
      )
  experiment, params = restore.restore_params(path, step)
  effective = jax.jit(quantized.effective_params, static_argnums=0)(
    experiment.model, params
  )
  config = dataclasses.replace(experiment.model, family='float')
  return Loaded(decoder.bind(config, effective), tokenizer, path)


def complete(
  loaded: Loaded,
  prompt: str,
  *,
  new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[str] = (),
) -> str:
  """The text that continues `prompt`, without it.

  An empty prompt starts a document. A prompt past the context keeps its end.

  Args:
    loaded: model and tokenizer.
    prompt: text to continue.
    new_tokens: most tokens to add.
    sampling: how tokens are chosen; greedy by default.
    seed: the same seed, prompt and model give the same text.
    stop: the text ends before the first occurrence of any of these.

  Raises:
    ValueError: an empty stop string, or more new tokens than the model's
      context holds.
  """
  [text] = complete_all(
    loaded,
    [prompt],
    new_tokens=new_tokens,
    sampling=sampling,
    seed=seed,
    stop=stop,
  )
  return text


def complete_all(
  loaded: Loaded,
  prompts: Sequence[str],
  *,
  new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[str] = (),
) -> list[str]:
  """`complete` of each prompt, all in one batch.

  A row is drawn from the seed and its place in the batch, whatever the other
  rows are.
  """
  decoding = _start(loaded, prompts, new_tokens, sampling, seed, stop)
  piece = _PIECE if stop else new_tokens
  *_, texts = _growing_texts(loaded, decoding, stop, piece)
  return texts


def stream(
  loaded: Loaded,
  prompt: str,
  *,
  new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
  stop: Sequence[str] = (),
) -> Iterator[str]:
  """The text of `complete`, in pieces as it comes.

  No piece holds a part of a stop string, nor of a character while the rest
  may come. Arguments and errors are those of `complete`; what is refused is
  refused at the call.
  """
  decoding = _start(loaded, [prompt], new_tokens, sampling, seed, stop)

  def pieces():
    shown = 0
    for [text] in _growing_texts(loaded, decoding, stop, _PIECE):
      if len(text) > shown:
        yield text[shown:]
        shown = len(text)

  return pieces()


def _start(
  loaded: Loaded,
  prompts: Sequence[str],
  new_tokens: int,
  sampling: Sampling,
  seed: int,
  stop: Sequence[str],
) -> engine.Decoding:
  stopping.check(stop)
  end = loaded.end_of_text
  room = max(loaded.model.config.context_length - new_tokens, 1)
  return engine.Decoding(
    loaded.model,
    [(loaded.tokenizer.encode(p).ids or [end])[-room:] for p in prompts],
    new_tokens=new_tokens,
    stop=end,
    sampling=sampling,
    seed=seed,
  )


def _growing_texts(
  loaded: Loaded, decoding: engine.Decoding, stop: Sequence[str], piece: int
) -> Iterator[list[str]]:
  """The settled text of each row every `piece` tokens, until all end."""
  while not all(decoding.done):
    decoding.advance(piece)
    texts = []
    for row, done in enumerate(decoding.done):
      text, ended = stopping.settled(
        loaded.tokenizer.decode(decoding.rows[row]), stop, done
      )
      if ended:
        decoding.end(row)
      texts.append(text)
    yield texts
