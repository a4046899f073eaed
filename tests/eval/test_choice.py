# SPDX-License-Identifier: Apache-2.0
import pytest

from tritera_jax.eval import choice, continuations
from tritera_jax.eval.choice import Question, Scored


def test_what_is_likeliest_depends_on_what_it_is_divided_by():
  # -6/2, -7/3, -9/5 a token; -6/4, -7/9, -9/10 a character; -6/4, -7/9, -9/20.
  scored = Scored((-6.0, -7.0, -9.0), (2, 3, 4), (4, 9, 10), (4, 9, 20))
  assert scored.likeliest == 0
  assert scored.likeliest_per_token == 2  # -3, -2.33, -2.25
  assert scored.likeliest_per_character == 1  # -1.5, -0.78, -0.9
  assert scored.likeliest_per_byte == 2  # -1.5, -0.78, -0.45
  questions = [
    Question('x', ('a', 'b', 'c'), answer) for answer in (0, 1, 2, 2)
  ]
  assert choice.accuracy(questions, [scored] * 4) == {
    'acc': 0.25, 'acc_norm': 0.25, 'acc_bytes': 0.5, 'acc_tokens': 0.5,
  }  # fmt: skip


def test_a_context_gives_its_last_spaces_to_the_continuation(latent):
  ids = lambda text: latent.tokenizer.encode(text).ids
  found = choice.pair(latent.tokenizer, 'def f(', 'x)')
  assert [*found.context, *found.continuation] == ids('def f(x)')
  assert found.context == ids('def f(')
  for context, more in (('a = ', 'b'), ('a =', ' b')):
    found = choice.pair(latent.tokenizer, context, more)
    assert (found.context, found.continuation) == (ids('a ='), ids(' b'))


def test_a_choice_that_melts_into_the_context_is_encoded_alone(latent):
  """'(' and ')' are one token together: nothing would be left to score."""
  ids = lambda text: latent.tokenizer.encode(text).ids
  assert len(ids('def f()')) == len(ids('def f('))
  found = choice.pair(latent.tokenizer, 'def f(', ')')
  assert (found.context, found.continuation) == (ids('def f('), ids(')'))


def test_choices_are_scored_as_text(latent):
  questions = [
    Question('x =', ('1', 'déjà'), 0),
    Question('def f(', ('self', 'a', ')'), 2, delimiter=''),
  ]
  one, two = choice.score(latent, questions, batch_size=4)
  assert (one.characters, one.bytes) == ((1, 4), (1, 6))
  assert two.characters == (4, 1, 1)
  encoded = choice.pair(latent.tokenizer, 'x =', ' déjà')
  assert one.tokens[1] == len(encoded.continuation)
  [alone] = continuations.score(latent.model, [encoded], batch_size=4)
  assert one.nats[1] == alone.log_likelihood
  with pytest.raises(ValueError, match='request 0 has an empty context'):
    choice.score(latent, [Question('', ('a',), 0)])
