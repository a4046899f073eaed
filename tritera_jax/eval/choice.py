# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: which of several continuations is the likeliest."""

from collections.abc import Sequence
import dataclasses

import numpy as np
import tokenizers

from tritera_jax.eval import continuations
from tritera_jax.eval.continuations import Request
from tritera_jax.generate.load import Loaded


@dataclasses.dataclass(frozen=True)
class Question:
  """A context and what may follow it.

  Attributes:
    context: text, not empty.
    choices: texts; the model reads `delimiter` before each.
    answer: index of the right one.
    delimiter: between the context and a choice.
  """

  context: str
  choices: tuple[str, ...]
  answer: int
  delimiter: str = ' '


@dataclasses.dataclass(frozen=True)
class Scored:
  """Log-likelihoods of a question's choices, delimiters included, in nats.

  Attributes:
    nats: of each choice, at most 0.
    tokens: of each, its delimiter's included.
    characters, bytes: of each, without its delimiter.
  """

  nats: tuple[float, ...]
  tokens: tuple[int, ...]
  characters: tuple[int, ...]
  bytes: tuple[int, ...]

  @property
  def likeliest(self) -> int:
    return int(np.argmax(self.nats))

  @property
  def likeliest_per_token(self) -> int:
    return int(np.argmax(np.divide(self.nats, self.tokens)))

  @property
  def likeliest_per_character(self) -> int:
    return int(np.argmax(np.divide(self.nats, self.characters)))

  @property
  def likeliest_per_byte(self) -> int:
    return int(np.argmax(np.divide(self.nats, self.bytes)))


def score(
  loaded: Loaded,
  questions: Sequence[Question],
  *,
  batch_size: int = 16,
  progress=iter,
) -> list[Scored]:
  """Scores the choices of each question.

  Args:
    loaded: model and tokenizer.
    questions: any number.
    batch_size: rows at once.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    ValueError: an empty context or choice, or a choice that is longer than the
      model's context.
  """
  requests = [
    pair(loaded.tokenizer, question.context, question.delimiter + choice)
    for question in questions
    for choice in question.choices
  ]
  scores = iter(
    continuations.score(
      loaded.model, requests, batch_size=batch_size, progress=progress
    )
  )
  lengths = iter([len(request.continuation) for request in requests])
  return [
    Scored(
      nats=tuple(next(scores).log_likelihood for _ in question.choices),
      tokens=tuple(next(lengths) for _ in question.choices),
      characters=tuple(map(len, question.choices)),
      bytes=tuple(len(choice.encode()) for choice in question.choices),
    )
    for question in questions
  ]


def accuracy(
  questions: Sequence[Question], scored: Sequence[Scored]
) -> dict[str, float]:
  """Shares of questions whose right choice is the likeliest.

  `acc`, `acc_norm` (a character) and `acc_bytes` are lm-eval's of these names;
  `acc_tokens` divides by tokens, as it does not.
  """
  return {
    name: float(
      np.mean(
        [
          getattr(found, attribute) == question.answer
          for question, found in zip(questions, scored, strict=True)
        ]
      )
    )
    for name, attribute in (
      ('acc', 'likeliest'),
      ('acc_norm', 'likeliest_per_character'),
      ('acc_bytes', 'likeliest_per_byte'),
      ('acc_tokens', 'likeliest_per_token'),
    )
  }


def pair(
  tokenizer: tokenizers.Tokenizer, context: str, continuation: str
) -> Request:
  """Both texts as ids: encoded as one, split where the context's own end.

  Spaces at the context's end go to the continuation, where tokenizers have
  them. This is how lm-eval splits. Where one token spans the end of both and
  nothing would be left, the continuation is encoded alone.
  """
  stripped = context.rstrip()
  whole = tokenizer.encode(context + continuation).ids
  start = tokenizer.encode(stripped).ids
  return Request(
    start,
    whole[len(start) :]
    or tokenizer.encode(continuation, add_special_tokens=False).ids,
  )
