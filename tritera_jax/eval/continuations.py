# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations after contexts, in batches.

What a continuation scores does not depend on what is beside it: rows of a batch
have a length that follows from the row alone, and a short batch is filled up.
With another batch size the same sums are formed in another order.

Shapes: B rows, T tokens of a row, C tokens of a continuation, D width.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tritera_jax.model.interface import LanguageModel
from tritera_jax.train import loss

_SHORTEST = 16


class Request(NamedTuple):
  """Token ids, at least one each."""

  context: Sequence[int]
  continuation: Sequence[int]


class Score(NamedTuple):
  """Of a continuation.

  Attributes:
    log_likelihood: in nats.
    is_greedy: whether greedy decoding would have written it.
  """

  log_likelihood: float
  is_greedy: bool


class _Row(NamedTuple):
  """What the model reads, and whose scores it is read for."""

  tokens: tuple[int, ...]
  requests: list[int]


@jax.jit
def _hidden(model, tokens_BT):
  return model.hidden(tokens_BT)[0]


@jax.jit
def _scores(model, x_BTD, row_B, start_B, targets_BC):
  """Nats of targets, and whether they are the likeliest tokens.

  Those of row_B's tokens from start_B on.
  """
  C, T = targets_BC.shape[1], x_BTD.shape[1]
  position_BC = jnp.minimum(start_B[:, None] + jnp.arange(C), T - 1)

  def scored(logits, targets):
    no_token_V = jnp.arange(logits.shape[-1]) >= model.config.vocab_size
    likeliest = jnp.argmax(jnp.where(no_token_V, -jnp.inf, logits), axis=-1)
    return loss.token_losses(logits, targets), likeliest == targets

  x_BCD = x_BTD[row_B[:, None], position_BC]
  return loss.over_logits(scored, model, x_BCD, targets_BC)


def score(
  model: LanguageModel,
  requests: Sequence[Request],
  *,
  batch_size: int = 16,
  progress=iter,
) -> list[Score]:
  """Scores each request; what several of them read alike is read once.

  A context that is too long loses its start: the model sees at most its
  context_length tokens before the last one that is scored.

  Args:
    model: latent, effective or packed.
    requests: what is scored.
    batch_size: rows at once.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    ValueError: a request without context or continuation, with an id outside
      the vocabulary, or a continuation longer than the model's context.
  """
  found: list[Score | None] = [None] * len(requests)
  batches = list(_batches(model, requests, batch_size))
  for length, rows in progress(batches):
    tokens_BT = np.zeros((batch_size, length), np.int32)
    for number, row in enumerate(rows):
      tokens_BT[number, : len(row.tokens)] = row.tokens
    x_BTD = _hidden(model, tokens_BT)
    for part, (row_B, start_B, targets_BC) in _targets(
      rows, requests, batch_size, length
    ):
      nats_BC, likeliest_BC = map(
        np.array, _scores(model, x_BTD, row_B, start_B, targets_BC)
      )
      for place, index in enumerate(part):
        n = len(requests[index].continuation)
        found[index] = Score(
          -float(nats_BC[place, :n].sum(dtype=np.float64)),
          bool(likeliest_BC[place, :n].all()),
        )
  return [score for score in found if score is not None]


def _batches(model, requests, batch_size):
  """(length, rows) of each forward pass."""
  if batch_size < 1:
    raise ValueError(f'batch_size={batch_size} must be >= 1')
  context = model.config.context_length
  rows: dict[tuple[int, ...], list[int]] = {}
  for index, request in enumerate(requests):
    _check(model.config, index, request)
    ids = (*request.context, *request.continuation)[-(context + 1) :]
    rows.setdefault(ids[:-1], []).append(index)
  by_length: dict[int, list[_Row]] = collections.defaultdict(list)
  for tokens, those in rows.items():
    by_length[_rounded(len(tokens), context)].append(_Row(tokens, those))
  for length in sorted(by_length, reverse=True):  # what may not fit comes first
    rows_of_length = by_length[length]
    for start in range(0, len(rows_of_length), batch_size):
      yield length, rows_of_length[start : start + batch_size]


def _targets(rows, requests, batch_size, length):
  """Batches of the requests of some rows, and the arrays for `_scores`."""
  by_length = collections.defaultdict(list)
  for number, row in enumerate(rows):
    for index in row.requests:
      targets = requests[index].continuation
      by_length[_rounded(len(targets), length)].append((number, index))
  for width, those in by_length.items():
    for first in range(0, len(those), batch_size):
      part = those[first : first + batch_size]
      row_B = np.zeros((batch_size,), np.int32)
      start_B = np.zeros((batch_size,), np.int32)
      targets_BC = np.zeros((batch_size, width), np.int32)
      for place, (number, index) in enumerate(part):
        targets = requests[index].continuation
        row_B[place] = number
        start_B[place] = len(rows[number].tokens) - len(targets)
        targets_BC[place, : len(targets)] = targets
      yield [index for _, index in part], (row_B, start_B, targets_BC)


def _rounded(length: int, most: int) -> int:
  """Up to 2^n or 3 x 2^n: few shapes to compile, at most half of one unused."""
  power = _SHORTEST
  while power < length:
    power *= 2
  if power > _SHORTEST and length <= power // 4 * 3:
    power = power // 4 * 3
  return min(power, most)


def _check(config, index: int, request: Request):
  for field, ids in zip(request._fields, request, strict=True):
    if not len(ids):
      raise ValueError(f'request {index} has an empty {field}')
    bad = [i for i in ids if not 0 <= i < config.vocab_size]
    if bad:
      raise ValueError(
        f'request {index}: {field} has id {bad[0]}, outside the vocabulary of '
        f'{config.vocab_size}; was it made by another tokenizer?'
      )
  if len(request.continuation) > config.context_length:
    raise ValueError(
      f'request {index} has a continuation of {len(request.continuation)} '
      f'tokens, more than context_length={config.context_length}'
    )
