# SPDX-License-Identifier: Apache-2.0
"""Stop strings, streaming and batches, on a model that says what it is told."""

import dataclasses
import io
import random

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_decoder import VARIANTS, parameters
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.generate import load, stopping, terminal
from tritera_jax.generate.load import Loaded
from tritera_jax.generate.sampling import Sampling
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Decoder

TEXT = 'a日本語 émoji 🙂\n\nab ab\n🙂🙂 abc ñ\n\nend'
NEW_TOKENS = 96
CONFIG = ModelConfig(
  family='float',
  vocab_size=257,
  layers=1,
  d_model=4,
  d_ff=4,
  heads=1,
  kv_heads=1,
  head_dim=4,
  context_length=160,
)


class Script(Decoder):
  """Says `script`, whose first token follows a prompt of one token."""

  traces = 0

  def __init__(self, script):
    self.config = CONFIG
    self.script = nnx.Param(jnp.asarray(script, jnp.int32))

  def hidden(self, tokens_BT, positions_BT=None, cache=None):
    Script.traces += 1
    says_BT = self.script.get_value()[positions_BT]
    x_BT1 = says_BT[..., None].astype(jnp.float32)
    return jnp.tile(x_BT1, CONFIG.d_model), cache

  def logits(self, x_BTD):
    says_BT = x_BTD[..., 0].astype(jnp.int32)
    return 9.0 * jax.nn.one_hot(says_BT, self.config.padded_vocab_size)


@pytest.fixture(scope='module')
def bytes_alone():
  """A tokenizer without merges: a token is a byte."""
  return tokenizer_lib.train_tokenizer([], 257)


@pytest.fixture
def say(bytes_alone):
  """A model that continues any one-byte prompt with the given bytes."""
  ids = {
    byte: bytes_alone.token_to_id(letter)
    for byte, letter in byte_letters().items()
  }

  def make(text: str | bytes) -> Loaded:
    data = text.encode() if isinstance(text, str) else text
    script = np.zeros(160, np.int32)  # 0 ends the text
    script[: len(data)] = [ids[byte] for byte in data]
    return Loaded(Script(script), bytes_alone)

  return make


def byte_letters() -> dict[int, str]:
  """GPT-2's printable letter for each byte."""
  printable = [
    *range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100),
  ]  # fmt: skip
  others = [byte for byte in range(256) if byte not in printable]
  return {b: chr(b) for b in printable} | {
    b: chr(256 + n) for n, b in enumerate(others)
  }


def stream(loaded, prompt='x', **arguments):
  return list(load.stream(loaded, prompt, **arguments))


def cut(text, stop):
  """By definition: the longest start of text before any stop string."""
  for end in range(len(text)):
    if any(text.startswith(string, end) for string in stop):
      return text[:end]
  return text


@pytest.mark.parametrize('new_tokens', [*range(1, 20), NEW_TOKENS])
def test_pieces_join_to_the_whole_and_hold_whole_characters(say, new_tokens):
  want = TEXT.encode()[:new_tokens].decode('utf-8', 'replace')
  assert load.complete(say(TEXT), 'x', new_tokens=new_tokens) == want
  pieces = stream(say(TEXT), new_tokens=new_tokens)
  assert ''.join(pieces) == want
  assert all(pieces)
  # Half a character comes only at the very end, where tokens ran out.
  assert not any('\ufffd' in piece for piece in pieces[:-1])


def test_a_stream_comes_in_pieces(say):
  assert len(stream(say(TEXT), new_tokens=NEW_TOKENS)) >= 5


def test_bytes_that_are_no_text_arrive_too(say):
  data = b'ok \xff\xfe middle \xe6\x97 end \xf0\x9f'
  got = ''.join(stream(say(data), new_tokens=NEW_TOKENS))
  assert got == data.decode('utf-8', 'replace')


@pytest.mark.parametrize(
  'stop',
  [
    ('\n\n',),
    ('never there',),
    ('a',),
    ('語 é',),
    ('🙂\n',),
    ('abc', 'ab ab'),
    ('b ab\n🙂🙂 abc', 'ab\n'),  # the longer one begins before
    ('end',),
    ('end of it',),  # begun, never finished
    ('\ufffd',),  # half a character is not this one
  ],
)
def test_a_stop_string_cuts_the_unstopped_text(say, stop):
  want = cut(TEXT, stop)
  pieces = stream(say(TEXT), new_tokens=NEW_TOKENS, stop=stop)
  assert ''.join(pieces) == want
  assert load.complete(say(TEXT), 'x', new_tokens=NEW_TOKENS, stop=stop) == want


def test_random_stops_cut_random_texts(say):
  rng = random.Random(0)
  for _ in range(60):
    text = ''.join(rng.choices('ab🙂', k=rng.randrange(1, 24)))
    stop = tuple(
      ''.join(rng.choices('ab🙂', k=rng.randrange(1, 6))) for _ in range(3)
    )
    pieces = stream(say(text), new_tokens=NEW_TOKENS, stop=stop)
    assert ''.join(pieces) == cut(text, stop), (text, stop)


def test_what_is_settled_only_grows_and_never_past_the_end():
  rng = random.Random(1)
  for _ in range(500):
    text = ''.join(rng.choices('ab', k=12))
    stop = tuple(
      ''.join(rng.choices('ab', k=rng.randrange(1, 7))) for _ in range(2)
    )
    want, last = cut(text, stop), ''
    for length in range(len(text) + 1):
      got, ended = stopping.settled(text[:length], stop, False)
      assert got.startswith(last) and want.startswith(got)
      assert not ended or got == want
      last = got
    assert stopping.settled(text, stop, True) == (want, True)


def test_decoding_ends_soon_after_the_stop_string(say, monkeypatch):
  made = []
  advance = load.engine.Decoding.advance
  monkeypatch.setattr(
    load.engine.Decoding,
    'advance',
    lambda self, tokens: (advance(self, tokens), made.append(self.rows))[0],
  )
  load.complete(say(TEXT), 'x', new_tokens=NEW_TOKENS, stop=('\n\n',))
  [row] = made[-1]
  end = len(TEXT[: TEXT.index('\n\n') + 2].encode())
  assert end <= len(row) < end + 8
  assert len(made) > 1


@pytest.mark.parametrize(
  ('stop', 'message'),
  [
    (('a', ''), 'empty string, which every text holds; leave it out'),
    ('end', "is one string; give ('end',)"),
  ],
)
def test_stops_that_mean_nothing_are_refused(say, stop, message):
  for call in (load.complete, load.stream):  # before a piece is asked for
    with pytest.raises(ValueError) as error:
      call(say(TEXT), 'x', new_tokens=4, stop=stop)
    assert message in str(error.value)


def test_another_call_of_the_same_shapes_compiles_nothing(say):
  load.complete(say(TEXT), 'x', new_tokens=NEW_TOKENS)
  before = Script.traces
  stream(say(TEXT[::-1]), 'y', new_tokens=NEW_TOKENS, seed=5, stop=('q',))
  load.complete(say('other'), 'z', new_tokens=NEW_TOKENS, stop=('e',))
  assert Script.traces == before


def test_the_cache_is_handed_on_and_not_copied():
  model = Decoder(VARIANTS['float'], rngs=nnx.Rngs(0))
  decoding = load.engine.Decoding(model, [[1]], new_tokens=4, stop=0)
  cache = decoding._carry.cache
  decoding.advance(2)
  assert all(array.is_deleted() for array in jax.tree.leaves(cache))


@pytest.fixture(scope='module')
def lively(bytes_alone):
  """Large random weights: rows differ, and most bytes are no characters."""
  config = dataclasses.replace(
    VARIANTS['grouped'], vocab_size=257, context_length=64
  )
  return Loaded(decoder.bind(config, parameters(config)), bytes_alone)


PROMPTS = ['def f(self):\n', 'x', '', 'class 日本:  # 🙂']


@pytest.mark.parametrize(
  'sampling',
  [
    Sampling(),
    Sampling(temperature=1.0, min_p=0.02, repetition_penalty=1.2),
    Sampling(temperature=1.5, top_k=50),
  ],
)
def test_any_model_streams_what_it_completes(lively, sampling):
  for seed, prompt in enumerate(PROMPTS):
    arguments = {'new_tokens': 20, 'sampling': sampling, 'seed': seed}
    whole = load.complete(lively, prompt, **arguments)
    assert ''.join(stream(lively, prompt, **arguments)) == whole
    stop = (whole[3:5] or 'q', 'e')
    stopped = load.complete(lively, prompt, **arguments, stop=stop)
    assert stopped == cut(whole, stop)
    assert ''.join(stream(lively, prompt, **arguments, stop=stop)) == stopped


@pytest.mark.parametrize('stop', [(), ('\ufffd', 'e')])
@pytest.mark.parametrize('penalty', [1.0, 1.3])
def test_a_greedy_row_is_what_it_is_alone(lively, stop, penalty):
  arguments = {
    'new_tokens': 16,
    'stop': stop,
    'sampling': Sampling(repetition_penalty=penalty),
  }
  together = load.complete_all(lively, PROMPTS, **arguments)
  assert together == [
    load.complete(lively, prompt, **arguments) for prompt in PROMPTS
  ]
  assert stop or len(set(together)) == len(PROMPTS)


class Terminal(io.StringIO):
  """Lines that are typed; one of them may be Ctrl-C."""

  def isatty(self):
    return True

  def readline(self, *_):
    line = super().readline()
    if line == '^C\n':
      raise KeyboardInterrupt
    return line


def run(loaded, prompts, stdin):
  out = io.StringIO()
  terminal.run(
    loaded, prompts, stdin=stdin, write=out.write, new_tokens=NEW_TOKENS,
    stop=('\n',),
  )  # fmt: skip
  return out.getvalue()


def test_one_prompt_several_and_a_pipe(say):
  loaded = say(TEXT)
  assert run(loaded, ['x'], Terminal()) == 'xa日本語 émoji 🙂\n'
  assert run(loaded, ['x', 'y'], Terminal()) == (
    'xa日本語 émoji 🙂\nya日本語 émoji 🙂\n'
  )
  assert run(loaded, [], io.StringIO('p')) == 'pa日本語 émoji 🙂\n'


@pytest.mark.parametrize(
  ('typed', 'sign'), [('', '> \n'), ('\nnot read\n', '> ')]
)
def test_a_dialogue_ends_with_its_input_or_an_empty_line(say, typed, sign):
  got = run(say('hi\n'), [], Terminal('x\n^C\ny\n' + typed))
  assert got == '> xhi\n> \n> yhi\n' + sign


def test_an_interrupt_ends_one_continuation():
  def pieces(prompt):
    yield '1'
    if prompt == 'a':
      raise KeyboardInterrupt
    yield '2'

  out = io.StringIO()
  terminal.dialogue(pieces, stdin=Terminal('a\nb\n\n'), write=out.write)
  assert out.getvalue() == '> a1\n> b12\n> '


def test_pieces_are_written_as_they_come():
  out = io.StringIO()

  def pieces(prompt):
    assert out.getvalue() == '> a'
    yield '1'
    assert out.getvalue() == '> a1'
    yield '2'

  terminal.dialogue(pieces, stdin=Terminal('a\n\n'), write=out.write)
  assert out.getvalue() == '> a12\n> '
