# SPDX-License-Identifier: Apache-2.0
import json
import math
import sys

import numpy as np
import pytest

from tests.eval.numpy_scores import log_softmax
from tests.model import oracle
from tritera_jax import cli
from tritera_jax.checkpoint import restore
from tritera_jax.eval import text
from tritera_jax.eval.perplexity import HeldOutLoss

FIRST = 'def one(self):\n  return 1\n' * 3
SECOND, THIRD = 'a  b\nc', 'import os, sys # déjà vu\n' * 2


@pytest.fixture
def files(tmp_path):
  (tmp_path / 'a.txt').write_text(FIRST)
  lines = [{'text': SECOND}, {'text': ''}, {'text': THIRD}]
  (tmp_path / 'b.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  return [tmp_path / 'a.txt', tmp_path / 'b.jsonl']


@pytest.mark.parametrize(('length', 'stride'), [(32, 16), (20, 7)])
def test_the_loss_is_that_of_a_scorer_in_numpy(
  random_run, latent, files, length, stride
):
  experiment, params = restore.restore_params(random_run)
  tokens = [0]
  for document in (FIRST, SECOND, THIRD):
    tokens += [*latent.tokenizer.encode(document).ids, 0]
  nats = done = 0
  while done < len(tokens) - 1:
    # The last window is as long as the others, and reaches past the end.
    start = 0 if not done else done + stride - length
    window = np.array(tokens[start : start + length])
    losses = log_softmax(oracle.decoder(experiment.model, params, window))
    until = min(start + length, len(tokens) - 1)
    for t in range(done, until):
      nats -= losses[t - start, tokens[t + 1]]
    done = until
  got = text.evaluate(random_run, files, sequence_length=length, stride=stride)
  assert got.nats == pytest.approx(nats, rel=1e-5)
  assert got.tokens == len(tokens) - 1
  assert got.bytes == len((FIRST + SECOND + THIRD).encode())
  # def one(self): return 1, thrice; a b c; import os, sys # déjà vu, twice.
  assert (got.documents, got.words) == (3, 3 * 4 + 3 + 2 * 6)
  assert got.perplexity == pytest.approx(math.exp(nats / got.tokens), rel=1e-4)
  assert got.word_perplexity == pytest.approx(math.exp(nats / 27), rel=1e-4)
  assert got.bits_per_byte == pytest.approx(
    nats / math.log(2) / got.bytes, rel=1e-5
  )


def test_the_words_for_end_of_text_are_text(random_run, tmp_path):
  """As in training: or a text could end its own document."""
  (tmp_path / 'a.txt').write_text('a<|endoftext|>b')
  got = text.evaluate(random_run, [tmp_path / 'a.txt'])
  assert (got.documents, got.bytes, got.words) == (1, 15, 1)
  assert got.tokens > 4


def test_the_verb(random_run, files, capsys):
  want = str(text.evaluate(random_run, files, stride=8))
  names = [str(file) for file in files]
  command = ['eval', str(random_run), '--stride', '8', '--text', *names]
  assert cli.main(command) == 0
  assert capsys.readouterr().out == f'{want}\n'


def test_a_text_without_spaces_is_one_improbable_word(
  random_run, tmp_path, capsys
):
  """As Chinese is, and minified JSON: e^710 is past every float."""
  (tmp_path / 'a.txt').write_text('中文' * 200)
  args = ['eval', str(random_run), '--text', str(tmp_path / 'a.txt')]
  assert cli.main(args) == 0
  assert 'a token, inf a word (1 documents, 1 words)' in capsys.readouterr().out
  assert HeldOutLoss(nats=1e4, tokens=2, bytes=9).perplexity == math.inf


def test_files_of_a_folder_that_are_no_text_are_named(
  random_run, files, capsys
):
  folder = files[0].parent
  want = str(text.evaluate(random_run, [folder]))
  (folder / 'latin1.txt').write_bytes('déjà'.encode('latin-1'))
  (folder / 'nothing.txt').touch()
  assert cli.main(['eval', str(random_run), '--text', str(folder)]) == 0
  left_out = f'left out, not UTF-8: {folder}/latin1.txt'
  assert capsys.readouterr().out == f'{want}\n{left_out}\n'


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    (('--text', 'a.txt', '--data', 'd'), '--data and --text: one at a time'),
    (('--text', 'a.txt', '--tasks', 't'), '--text and --tasks: one at a time'),
    (('--text', 'a.txt', '--out', 'o'), '--out: only with --tasks'),
    (('--text', 'none.txt'), 'none.txt is neither a file nor a folder'),
    (('--text', 'empty.txt'), 'no text in empty.txt'),
    (('--text', 'a.txt', '--sequence-length', '65'), 'length=65 exceeds'),
    (('--text', 'a.txt', '--sequence-length', '-4'), '--sequence-length -4: '),
    (('--text', 'a.txt', '--stride', '0'), '--stride 0: must be at least 1'),
    (('--data', 'd', '--batch-size', '0'), '--batch-size 0: must be at least'),
    (('--text', 'a.txt', '--baselines'), '--baselines: only of a dataset'),
    (('--text', 'a.txt', '--split', 'train'), '--split: only of a dataset'),
    (('--data', 'd', '--text-field', 'f'), '--text-field: only with --text'),
    (('--tasks', 't', '--stride', '9'), '--stride: not with --tasks'),
    (('--tasks', 't', '--split', 's'), '--split: only of a dataset'),
    (('--tasks', 't', '--baselines'), '--baselines: only of a dataset'),
    (('--text', 'a.txt', 'latin1.txt'), 'latin1.txt is not UTF-8'),
    (('--text', 'a.parquet'), "pip install 'tritera_jax[data]'"),
  ],
)
def test_what_the_verb_refuses(
  random_run, files, capsys, monkeypatch, arguments, words
):
  monkeypatch.chdir(files[0].parent)
  (files[0].parent / 'empty.txt').write_text(' \n')
  (files[0].parent / 'latin1.txt').write_bytes('déjà'.encode('latin-1'))
  (files[0].parent / 'a.parquet').write_bytes(b'PAR1')
  for loaded in [m for m in sys.modules if m.split('.')[0] == 'pyarrow']:
    monkeypatch.setitem(sys.modules, loaded, None)
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  assert cli.main(['eval', str(random_run), *arguments]) == 1
  assert words in capsys.readouterr().err
