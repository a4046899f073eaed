# SPDX-License-Identifier: Apache-2.0
"""Loss on held-out text, in nats a token and bits a byte."""

import dataclasses
import math

from tritera_jax.data import loader
from tritera_jax.data.shards import TokenSource
from tritera_jax.model.decoder import Decoder
from tritera_jax.train import loss


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
  def bits_per_byte(self) -> float:
    return self.nats / math.log(2) / self.bytes


def held_out_loss(
  model: Decoder,
  source: TokenSource,
  *,
  sequence_length: int,
  stride: int | None = None,
  batch_size: int = 16,
  progress=iter,
) -> HeldOutLoss:
  """Scores a split in overlapping windows.

  Args:
    model: latent, effective or packed.
    source: the split.
    sequence_length: tokens a window sees, at most the model's context.
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
  model: Decoder,
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


def _windows(model, source, sequence_length, stride, limit_tokens=None):
  if sequence_length > model.config.context_length:
    raise ValueError(
      f'sequence_length={sequence_length} exceeds the context_length='
      f'{model.config.context_length} of the model'
    )
  stride = stride or max(1, sequence_length // 2)
  return loader.windows(source, sequence_length, stride, limit_tokens)
