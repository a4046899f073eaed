# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out text, in nats a token and bits a byte."""

import dataclasses
import math
from pathlib import Path

from tritera_jax.checkpoint import save
from tritera_jax.data import loader, shards
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.data.shards import TokenSource
from tritera_jax.generate import load
from tritera_jax.model.interface import LanguageModel
from tritera_jax.train import loss
from tritera_kernels.matmul import Activations


def exponential(nats: float) -> float:
  """e^nats; infinity where a float ends, at 709."""
  try:
    return math.exp(nats)
  except OverflowError:
    return math.inf


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
  """Total loss of a text; every token is scored once.

  Attributes:
    nats: summed negative log-likelihood.
    tokens: scored tokens, document ends included.
    bytes: UTF-8 bytes of the text, without the document ends.
  """

  nats: float
  tokens: int
  bytes: int

  @property
  def nats_per_token(self) -> float:
    return self.nats / self.tokens

  @property
  def perplexity(self) -> float:
    return exponential(self.nats_per_token)

  @property
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes

  def __str__(self) -> str:
    return (
      f'{self.nats_per_token:.4f} nats/token, '
      f'{self.bits_per_byte:.4f} bits/byte '
      f'({self.tokens:,} tokens, {self.bytes:,} bytes)'
    )


def evaluate(
  path: str | Path,
  data: str | Path | None = None,
  *,
  split: str = 'validation',
  sequence_length: int | None = None,
  stride: int | None = None,
  batch_size: int = 16,
  activations: Activations | None = None,
  progress=iter,
) -> HeldOutLoss:
  """Loss of a run or a packed model on a split of a dataset.

  Args:
    path: run folder or packed folder.
    data: dataset folder or bucket URL; default: the one that the run was
      trained on.
    split: of the dataset.
    sequence_length: tokens a window; default: the model's context.
    stride: tokens scored a window; default: half a window.
    batch_size: windows at once.
    activations: of a packed model: 'float', 'bfloat16' or 'int8'; default: its
      record's.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    FileNotFoundError: no such run, packed model or dataset.
    ValueError: the tokenizer of the model is not the dataset's, or an argument
      does not fit the model.
  """
  data = default_data(path) if data is None else data
  source = shards.open_split(data, split)
  loaded = load.load(path, activations=activations)
  ours = tokenizer_lib.fingerprint(loaded.tokenizer)
  theirs = source.manifest.tokenizer
  if ours != theirs:
    raise ValueError(
      f'the tokenizer of {path} is {ours}, that of {data} is {theirs}: the '
      'ids of one mean nothing to the other; prepare the text again with '
      f'--tokenizer {path}/tokenizer.json'
    )
  return held_out_loss(
    loaded.model,
    source,
    sequence_length=sequence_length,
    stride=stride,
    batch_size=batch_size,
    progress=progress,
  )


def default_data(path: str | Path) -> str:
  """The dataset that a run was trained on.

  Raises:
    FileNotFoundError: `path` is not a run folder.
    ValueError: it is a packed folder or was imported, and does not know.
  """
  packed = (Path(path) / 'model.safetensors').exists()
  data = '' if packed else save.read_experiment(path).data.path
  if not data:
    raise ValueError(
      f'{path} is {"packed" if packed else "imported"} and does not say what '
      'it was trained on; name a dataset with --data'
    )
  return data


def held_out_loss(
  model: LanguageModel,
  source: TokenSource,
  *,
  sequence_length: int | None = None,
  stride: int | None = None,
  batch_size: int = 16,
  progress=iter,
) -> HeldOutLoss:
  """Scores a split in overlapping windows.

  Args:
    model: latent, effective or packed.
    source: the split.
    sequence_length: tokens a window sees; default: the model's context.
    stride: tokens a window advances by, and scores; default: half a window,
      so that a token sees at least half a window before it.
    batch_size: windows at once.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    ValueError: sequence_length exceeds the context, or the stride exceeds it.
  """
  windows = _windows(model, source, sequence_length, stride)
  nats = loss.total_loss(model, windows, batch_size, progress)
  return HeldOutLoss(nats, source.tokens, source.bytes)


def head_loss(
  model: LanguageModel,
  source: TokenSource,
  *,
  tokens: int,
  sequence_length: int,
  stride: int | None = None,
  batch_size: int = 16,
  progress=iter,
) -> float:
  """Nats a token of the first `tokens` tokens: a quick look, to compare with.

  Arguments and errors are `held_out_loss`'s.
  """
  windows = _windows(model, source, sequence_length, stride, tokens)
  nats = loss.total_loss(model, windows, batch_size, progress)
  return nats / float(windows[2].sum())


def window_sizes(
  model: LanguageModel, sequence_length: int | None, stride: int | None
) -> tuple[int, int]:
  """Tokens of a window, and how many it advances by, defaults filled in.

  Raises:
    ValueError: sequence_length is not from 1 to the context.
  """
  context = model.config.context_length
  length = context if sequence_length is None else sequence_length
  if length > context:
    raise ValueError(
      f'sequence_length={length} exceeds the context_length={context} of the '
      'model'
    )
  if length < 1:
    raise ValueError(f'sequence_length={length} must be >= 1')
  return length, max(1, length // 2) if stride is None else stride


def _windows(model, source, sequence_length, stride, limit_tokens=None):
  sizes = window_sizes(model, sequence_length, stride)
  return loader.windows(source, *sizes, limit_tokens)
