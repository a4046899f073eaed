# SPDX-License-Identifier: Apache-2.0
"""Tokenizers as llama.cpp would read them.

That llama.cpp cuts as these rules say is checked by
`tests.drills.llama_cpp_reads`, which runs it.
"""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.gguf import tokenizer_keys

TEXTS = [
  "def f(x):\n    return x + 1\n\n\nclass A:\n    '''It's 2024.'''\n" * 3,
  'The quick brown fox, 12345 times; naïve café.\n' * 3,
]


def trained(pieces) -> tokenizers.Tokenizer:
  return tokenizer_lib.train_tokenizer(TEXTS, 320, pieces)


def of_gpt2() -> tokenizers.Tokenizer:
  """As GPT-2's and GPT-NeoX's are made: ByteLevel with its own expression."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=['<|endoftext|>'],
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    ),
  )
  return made


@pytest.mark.parametrize(
  'pieces, rule',
  [('gpt-2', 'gpt-2'), ('llama-3', 'llama-bpe'), ('code', None)],
)
def test_pieces_that_llama_cpp_knows_have_a_rule(pieces, rule):
  assert tokenizer_keys.exact_rule(trained(pieces)) == rule


def test_the_rule_of_bytelevel_is_gpt_2s():
  ours, theirs = trained('gpt-2'), of_gpt2()
  assert tokenizer_keys.exact_rule(theirs) == 'gpt-2'
  theirs.normalizer = normalizers.NFC()  # GPT-NeoX's
  assert tokenizer_keys.exact_rule(theirs) == 'gpt-2'
  # Our expression cuts as the library's own does.
  for text in (*TEXTS, "  a\n\n\tb 1234 it's  é\r\n ..!? \n"):
    cut = [pre.pre_tokenizer.pre_tokenize_str(text) for pre in (ours, theirs)]
    assert cut[0] == cut[1]
  theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  assert tokenizer_keys.exact_rule(theirs) is None


def test_llama_3_cuts_as_its_expression_says():
  """Cut by hand from the expression of Llama 3's tokenizer.json."""
  text = "It's 12345 x\n\n  y=foo_bar();\n"
  cut = trained('llama-3').pre_tokenizer.pre_tokenize_str(text)
  assert [text[start:end] for _, (start, end) in cut] == [
    'It', "'s", ' ', '123', '45', ' x', '\n\n', ' ', ' y', '=foo', '_bar',
    '();\n',
  ]  # fmt: skip


def test_merges_that_cannot_make_a_token_matter_to_llama_bpe():
  """llama.cpp ignores merges with that rule, where a piece is a token."""
  said = json.loads(trained('llama-3').to_str())
  said['model']['ignore_merges'] = False
  remade = tokenizers.Tokenizer.from_str(json.dumps(said))
  assert tokenizer_keys.exact_rule(remade) == 'llama-bpe'
  said['model']['vocab']['zqx'] = len(said['model']['vocab'])
  remade = tokenizers.Tokenizer.from_str(json.dumps(said))
  assert tokenizer_keys.exact_rule(remade) is None
  assert remade.encode('zqx').ids != [320]
  emulated = tokenizer_keys.as_llama_cpp(remade, 'llama-bpe')
  assert emulated.encode('zqx').tokens == ['zqx']


def test_what_a_vocabulary_holds():
  tokenizer = trained('gpt-2')
  tokenizer.add_tokens(['[UNUSED321]', '<plain>'])
  size = tokenizer.get_vocab_size()
  words = tokenizer_keys.vocabulary(tokenizer, size + 2, 0)
  assert len(words.tokens) == len(set(words.tokens)) == size + 2
  assert words.tokens[0] == '<|endoftext|>' and words.kinds[0] == 3
  assert words.kinds[1:257] == [1] * 256
  assert words.kinds[size - 2 :] == [4, 4, 5, 5]
  assert words.tokens[tokenizer.token_to_id('Ġ')] == 'Ġ'
  merges = json.loads(tokenizer.to_str())['model']['merges']
  assert words.merges == [f'{a} {b}' for a, b in merges]
  with pytest.raises(ValueError, match=f'ids up to {size - 1}, the model 300'):
    tokenizer_keys.vocabulary(tokenizer, 300, 0)


def test_other_kinds_of_tokenizers_are_refused():
  word = tokenizers.Tokenizer(models.WordLevel({'a': 0}, unk_token='a'))
  with pytest.raises(
    ValueError, match='WordLevel with decoder None.*; only byte'
  ):
    tokenizer_keys.vocabulary(word, 8, 0)
  lower = trained('gpt-2')
  lower.normalizer = normalizers.Lowercase()
  with pytest.raises(ValueError, match='changes text first .*Lowercase'):
    tokenizer_keys.vocabulary(lower, 512, 0)
  said = json.loads(trained('gpt-2').to_str())
  said['model']['byte_fallback'] = True
  with pytest.raises(ValueError, match='byte_fallback=True; only byte'):
    tokenizer_keys.vocabulary(
      tokenizers.Tokenizer.from_str(json.dumps(said)), 512, 0
    )


def test_agreement_counts_tokens_in_place():
  tokenizer = trained('code')
  assert tokenizer_keys.agreement(trained('gpt-2'), 'gpt-2', TEXTS[0]) == 1
  # 'code' has the line end and its spaces as one token, gpt-2's rule none of
  # both; 'x' is one token, in place, either way.
  text = 'x\n    x'
  assert tokenizer.encode(text).tokens == ['x', 'ĊĠĠĠĠ', 'x']
  share = tokenizer_keys.agreement(tokenizer, 'gpt-2', text)
  assert share == 1 / 3  # ' x' is a piece there
  with pytest.raises(ValueError, match='without a token'):
    tokenizer_keys.agreement(tokenizer, 'gpt-2', '')
