# SPDX-License-Identifier: Apache-2.0
"""A byte-level BPE tokenizer as llama.cpp reads it out of a GGUF file.

The file holds tokens, their kinds and merges, but of the rule by which text is
cut into pieces before merges only a name, `tokenizer.ggml.pre`: llama.cpp has
the rules (src/llama-vocab.cpp, llm_tokenizer_bpe of 00ad355). A tokenizer that
cuts in another way gives other ids there.
"""

from collections import Counter
import json
from typing import Any, Literal, NamedTuple, get_args

import tokenizers
from tokenizers import pre_tokenizers

from tritera_jax.data import tokenizer as tokenizer_lib

Pre = Literal['gpt-2', 'llama-bpe', 'qwen2']

# ggml's kinds of tokens (llama.h, llama_token_type).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Cut as these, and `ignore_merges`: a piece that is a token is that token,
# whatever merges say.
_LLAMA_3 = tokenizer_lib.LLAMA_3_PIECES
RULES: dict[str, tuple[str, bool]] = {
  'gpt-2': (tokenizer_lib.GPT_2_PIECES, False),
  'llama-bpe': (_LLAMA_3, True),
  'qwen2': (_LLAMA_3.replace(r'\p{N}{1,3}', r'\p{N}'), False),
}


class Vocabulary(NamedTuple):
  """What the file holds. `end` ends a document, and begins the first."""

  tokens: list[str]
  kinds: list[int]
  merges: list[str]
  end: int


def vocabulary(
  tokenizer: tokenizers.Tokenizer, rows: int, end: int
) -> Vocabulary:
  """A tokenizer's tokens for a model of `rows` rows of embedding.

  Args:
    tokenizer: byte-level BPE.
    rows: of the embedding; those that no token has get names of their own.
    end: id of the token that ends a document.

  Raises:
    ValueError: another kind of tokenizer, or one with more tokens than rows.
  """
  said = json.loads(tokenizer.to_str())
  model = said['model']
  _check_kind(said)
  ids = tokenizer.get_vocab(with_added_tokens=True)
  if max(ids.values()) >= rows:
    raise ValueError(
      f'the tokenizer has ids up to {max(ids.values())}, the model {rows} rows '
      'of embedding: they are not of one run'
    )
  tokens, kinds = [f'[UNUSED{n}]' for n in range(rows)], [UNUSED] * rows
  for n in range(rows):
    while tokens[n] in ids:
      tokens[n] += '_'
  for token, n in ids.items():
    tokens[n], kinds[n] = token, NORMAL
  for added in said['added_tokens']:
    kinds[added['id']] = CONTROL if added['special'] else USER_DEFINED
  merges = [m if isinstance(m, str) else ' '.join(m) for m in model['merges']]
  return Vocabulary(tokens, kinds, merges, end)


def _check_kind(said: dict[str, Any]):
  model = said['model']
  plain = {
    'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
    'end_of_word_suffix': None, 'byte_fallback': False,
  }  # fmt: skip
  odd = [
    f'{field}={model[field]!r}'
    for field, value in plain.items()
    if model.get(field, value) not in (value, '' if value is None else value)
  ]
  decoder = (said['decoder'] or {}).get('type')
  if model['type'] != 'BPE' or decoder != 'ByteLevel' or odd:
    raise ValueError(
      f'the tokenizer is {model["type"]} with decoder {decoder}'
      f'{"".join(", " + o for o in odd)}; only byte-level BPE is exported'
    )
  normalizer = said['normalizer']
  if normalizer not in (None, {'type': 'NFC'}):
    raise ValueError(
      f'the tokenizer changes text first ({normalizer}), llama.cpp does not'
    )


def exact_rule(tokenizer: tokenizers.Tokenizer) -> Pre | None:
  """The name of llama.cpp's rule that cuts text as the tokenizer does."""
  said = json.loads(tokenizer.to_str())
  regex = _regex(said['pre_tokenizer'])
  for name in get_args(Pre):
    rule, ignore_merges = RULES[name]
    if regex == rule and (
      said['model'].get('ignore_merges', False) == ignore_merges
      or _merges_make_every_token(said)
    ):
      return name
  return None


def _regex(said: dict[str, Any] | None) -> str | None:
  """What cuts text, if it is one regular expression and then bytes."""
  if said is None:
    return None
  parts = said['pretokenizers'] if said['type'] == 'Sequence' else [said]
  *cuts, last = parts
  if last['type'] != 'ByteLevel' or last['add_prefix_space']:
    return None
  if not cuts:
    return tokenizer_lib.GPT_2_PIECES if last['use_regex'] else None
  [cut, *more] = cuts
  if more or last['use_regex'] or cut['type'] != 'Split' or cut['invert']:
    return None
  return cut['pattern'].get('Regex') if cut['behavior'] == 'Isolated' else None


def _merges_make_every_token(said: dict[str, Any]) -> bool:
  """Whether `ignore_merges` is the same, set or not."""
  said = {**said, 'model': {**said['model'], 'ignore_merges': False}}
  model = tokenizers.Tokenizer.from_str(json.dumps(said)).model
  added = {token['content'] for token in said['added_tokens']}
  return all(
    [found.id for found in model.tokenize(token)] == [id]
    for token, id in said['model']['vocab'].items()
    if token not in added
  )


def as_llama_cpp(
  tokenizer: tokenizers.Tokenizer, pre: Pre
) -> tokenizers.Tokenizer:
  """The tokenizer with llama.cpp's rule `pre` in place of its own."""
  regex, ignore_merges = RULES[pre]
  said = json.loads(tokenizer.to_str())
  said['model']['ignore_merges'] = ignore_merges
  said['normalizer'] = None
  other = tokenizers.Tokenizer.from_str(json.dumps(said))
  other.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(regex), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  return other


def agreement(tokenizer: tokenizers.Tokenizer, pre: Pre, text: str) -> float:
  """The share of a text's tokens that the rule `pre` gives as well, in place.

  Raises:
    ValueError: the text has no token.
  """
  places = []
  for one in (tokenizer, as_llama_cpp(tokenizer, pre)):
    encoded = one.encode(text)
    places.append(Counter(zip(encoded.ids, encoded.offsets, strict=True)))
  ours, theirs = places
  if not ours:
    raise ValueError('a sample text without a token says nothing')
  return (ours & theirs).total() / ours.total()
