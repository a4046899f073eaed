# SPDX-License-Identifier: Apache-2.0
"""A model as lm-eval sees one. Importing this imports lm-eval.

Texts become tokens, and long ones are cut, as by lm-eval's own `hf` model, so
that both score the same items alike.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval import utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import (  # pyright: ignore[reportMissingImports]
  TemplateLM,
)
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
  handle_stop_sequences,
  normalize_gen_kwargs,
)
import tqdm

from tritera_jax.eval import continuations
from tritera_jax.eval.continuations import Request
from tritera_jax.generate import load
from tritera_jax.generate.load import Loaded
from tritera_jax.generate.sampling import Sampling

_MOST_NEW_TOKENS = 256  # lm-eval's, where a task states none
_SAMPLING = ('temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty')


class TriteraLM(TemplateLM):
  """Scores and continues the texts of lm-eval's tasks.

  Attributes:
    loaded: model and tokenizer.
    batch_size: rows at once.
    seed: of sampling; what is sampled depends on the batch size too.
    details: of the model, for lm-eval's results.
  """

  def __init__(
    self,
    loaded: Loaded,
    *,
    batch_size: int = 16,
    seed: int = 0,
    details: dict[str, Any] | None = None,
  ):
    super().__init__()
    self.loaded = loaded
    self.batch_size = batch_size
    self.seed = seed
    self.details = details or {}
    self._end = loaded.end_of_text
    # A tokenizer that begins texts with a token begins the empty one with it.
    self._prefix = [*loaded.tokenizer.encode('').ids, self._end][0]
    self._prefix_text = loaded.tokenizer.decode(
      [self._prefix], skip_special_tokens=False
    )

  @property
  def eot_token_id(self) -> int:
    return self._end

  @property
  def prefix_token_id(self) -> int:
    return self._prefix

  @property
  def max_length(self) -> int:
    return self.loaded.model.config.context_length

  @property
  def max_gen_toks(self) -> int:
    return _MOST_NEW_TOKENS

  def get_model_info(self) -> dict[str, Any]:
    return self.details

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs
  ) -> list[int]:
    """Ids of a text. None: what the tokenizer adds, unless it is there."""
    del kwargs
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self._prefix_text)
    return self.loaded.tokenizer.encode(
      string, add_special_tokens=add_special_tokens
    ).ids

  def _encode_pair(
    self, context: str, continuation: str
  ) -> tuple[list[int], list[int]]:
    """lm-eval's, but for a continuation that would have no token left."""
    start, more = super()._encode_pair(context, continuation)
    return start, more or self.tok_encode(continuation, False)

  def _loglikelihood_tokens(
    self, requests: Sequence, disable_tqdm: bool = False, **kwargs
  ) -> list[tuple[float, bool]]:
    """Of ((context, continuation) or None, ids, ids) each."""
    del kwargs
    scores = continuations.score(
      self.loaded.model,
      [
        Request(context or [self._prefix], continuation)
        for _, context, continuation in requests
      ],
      batch_size=self.batch_size,
      progress=_bar('batch', disable_tqdm),
    )
    # lm-eval wants plain tuples, which its caches hold.
    answers = [(score.log_likelihood, score.is_greedy) for score in scores]
    for (text, _, _), answer in zip(requests, answers, strict=True):
      if text is not None:
        self.cache_hook.add_partial('loglikelihood', text, answer)
    return answers

  def loglikelihood_rolling(
    self, requests: Sequence, disable_tqdm: bool = False
  ) -> list[float]:
    """Of whole texts, in lm-eval's windows: each token once, in full ones."""
    windows, owners = [], []
    for number, (text,) in enumerate(request.args for request in requests):
      for pair in utils.get_rolling_token_windows(
        token_list=self.tok_encode(text),
        prefix_token=self._prefix,
        max_seq_len=self.max_length,
        context_len=1,
      ):
        windows.append((None, *utils.make_disjoint_window(pair)))
        owners.append(number)
    sums = [0.0] * len(requests)
    found = self._loglikelihood_tokens(windows, disable_tqdm)
    for number, (nats, _) in zip(owners, found, strict=True):
      sums[number] += nats
    for request, total in zip(requests, sums, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return sums

  def generate_until(
    self, requests: Sequence, disable_tqdm: bool = False
  ) -> list[str]:
    """Continuations of prompts, each up to its task's stop strings.

    Raises:
      ValueError: a task's generation_kwargs ask for what is not there, or for
        more new tokens than the context holds.
    """
    groups: dict[tuple, list[int]] = {}
    for number, request in enumerate(requests):
      groups.setdefault(_decoding(request.args[1]), []).append(number)
    batches = []
    for decoding, numbers in groups.items():
      # Prompts of one length decode together.
      numbers.sort(key=lambda n: -len(self.tok_encode(requests[n].args[0])))
      for first in range(0, len(numbers), self.batch_size):
        batches.append((decoding, numbers[first : first + self.batch_size]))
    texts = [''] * len(requests)
    bar = _bar('batch', disable_tqdm)
    for place, (decoding, numbers) in enumerate(bar(batches)):
      stop, new_tokens, sampling = decoding
      if new_tokens >= self.max_length:
        raise ValueError(
          f'max_gen_toks={new_tokens} leaves no room for a prompt in the '
          f"model's context_length={self.max_length}; state fewer in the "
          "task's generation_kwargs"
        )
      prompts = [requests[number].args[0] for number in numbers]
      # Full batches have one shape to compile.
      prompts += prompts[-1:] * (self.batch_size - len(prompts))
      found = load.complete_all(
        self.loaded,
        prompts,
        new_tokens=new_tokens,
        sampling=sampling,
        seed=self.seed + place,
        stop=stop,
      )
      for number, text in zip(numbers, found, strict=False):
        texts[number] = text
        self.cache_hook.add_partial(
          'generate_until', requests[number].args, text
        )
    return texts


def _decoding(stated: dict[str, Any]) -> tuple[tuple[str, ...], int, Sampling]:
  """Stop strings, most new tokens and how tokens are chosen."""
  fields = dict(normalize_gen_kwargs(stated, _MOST_NEW_TOKENS))
  until = handle_stop_sequences(fields.pop('until'), eos=None)
  new_tokens = fields.pop('max_gen_toks')
  sampled = fields.pop('do_sample')
  if sampled:
    fields.setdefault('temperature', 1.0)
  else:
    fields['temperature'] = 0.0
  unknown = fields.keys() - set(_SAMPLING)
  if unknown:
    raise ValueError(
      f'generation_kwargs has {", ".join(sorted(unknown))}; understood are '
      f'until, max_gen_toks, do_sample, {", ".join(_SAMPLING)}'
    )
  stop = tuple(text for text in until if text)
  return stop, new_tokens, Sampling(**fields)


def _bar(unit: str, disable: bool):
  def bar(batches: Iterable):
    return tqdm.tqdm(batches, unit=unit, leave=False, disable=disable)

  return bar
