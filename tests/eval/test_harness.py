# SPDX-License-Identifier: Apache-2.0
"""Local tasks through the real lm-eval, which is not part of the test extra."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.eval import numpy_scores
from tritera_jax import cli
from tritera_jax.checkpoint import pack, restore
from tritera_jax.eval import choice, harness
from tritera_jax.eval.choice import Question
from tritera_jax.generate import load

TASKS = Path(__file__).parent / 'tasks'
NAMES = ('tritera_next_line', 'tritera_pages', 'tritera_rest_of_line')
INSTALLED = importlib.util.find_spec('lm_eval') is not None
with_lm_eval = pytest.mark.skipif(
  not INSTALLED,
  reason="needs lm_eval: pip install -e '.[eval]', then run this file",
)


def rows(name: str) -> list[dict]:
  lines = (TASKS / f'{name}.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def records(random_run):
  """What the latents gave, and what their packed form did."""
  return [
    harness.evaluate(
      path, NAMES, include=TASKS, limit=5, batch_size=4, samples=True,
      command='a command', **more,
    )
    for path, more in (
      (random_run, {}),
      (random_run / 'packed' / 'two_bit', {'cache': 'float32'}),
    )
  ]  # fmt: skip


def answers(record: dict, task: str) -> list:
  items = record['lm_eval']['samples'][task]
  return [answer for item in items for [answer] in item['resps']]


@with_lm_eval
def test_packed_weights_score_as_the_latents_do(records):
  latent, packed = records
  assert packed['lm_eval']['results'].keys() == set(NAMES)
  for name in NAMES[:1]:
    for one, other in zip(
      answers(latent, name), answers(packed, name), strict=True
    ):
      assert one[0] == pytest.approx(other[0], rel=1e-5)
      assert one[1] == other[1]
  assert answers(latent, NAMES[1]) == pytest.approx(
    answers(packed, NAMES[1]), rel=1e-5
  )
  assert answers(latent, NAMES[2]) == answers(packed, NAMES[2])
  for name in (NAMES[0], NAMES[2]):
    one, other = (record['lm_eval']['results'][name] for record in records)
    assert one == other


@with_lm_eval
def test_choices_score_as_without_lm_eval(records, latent):
  questions = [
    Question(row['context'], tuple(row['choices']), row['answer'], '')
    for row in rows('next_line')[:5]
  ]
  scored = choice.score(latent, questions, batch_size=4)
  want = [nats for found in scored for nats in found.nats]
  got = [nats for nats, _ in answers(records[0], NAMES[0])]
  assert got == want
  results = records[0]['lm_eval']['results'][NAMES[0]]
  accuracy = choice.accuracy(questions, scored)
  for name in ('acc', 'acc_norm'):
    assert results[f'{name},none'] == accuracy[name]


@with_lm_eval
def test_a_page_scores_as_in_numpy(records, random_run, latent):
  """In the windows that lm-eval's documentation draws."""
  experiment, params = restore.restore_params(random_run)
  page = rows('pages')[4]['text']
  ids = latent.tokenizer.encode(page).ids
  assert len(ids) < 64
  want, _ = numpy_scores.continuation(experiment.model, params, [0], ids)
  assert answers(records[0], NAMES[1])[4] == pytest.approx(want, rel=1e-5)


@with_lm_eval
def test_generated_text_ends_where_its_task_says(records, latent):
  for row, text in zip(
    rows('rest_of_line')[:5], answers(records[0], NAMES[2]), strict=True
  ):
    free = load.complete(latent, row['start'], new_tokens=12)
    assert text == free.split('\n')[0]


@with_lm_eval
def test_the_record_says_what_was_run(records, random_run, tmp_path):
  experiment, params = restore.restore_params(random_run)
  trits = pack.latent_fingerprint(experiment.model, params)
  for record, kind in zip(records, ('run', 'packed'), strict=True):
    assert record['model']['kind'] == kind
    assert record['model']['fingerprint'] == trits
    assert record['command'] == 'a command'
    assert record['lm_eval']['versions'] == dict.fromkeys(NAMES, 1.0)
    assert {'jax', 'lm_eval', 'tritera_jax'} <= record['packages'].keys()
  harness.write(records[0], tmp_path / 'deep' / 'results.json')
  assert (
    json.loads((tmp_path / 'deep' / 'results.json').read_text()) == (records[0])
  )


@with_lm_eval
def test_the_verb(random_run, tmp_path, capsys):
  file = tmp_path / 'results.json'
  command = [
    'eval', str(random_run), '--tasks', NAMES[1], '--include', str(TASKS),
    '--limit', '1', '--batch-size', '4', '--out', str(file),
  ]  # fmt: skip
  assert cli.main(command) == 0
  out = capsys.readouterr().out
  assert 'bits_per_byte' in out and str(file) in out
  record = json.loads(file.read_text())
  assert record['command'] == ' '.join(['tritera', *command])
  assert 'samples' not in record['lm_eval']


@with_lm_eval
def test_a_tokenizer_that_begins_texts_begins_them_once(latent):
  """As Llama's: lm-eval's hf model adds nothing where the text has it."""
  import tokenizers
  from tokenizers import processors

  from tritera_jax.eval.adapter import TriteraLM

  tokenizer = tokenizers.Tokenizer.from_str(latent.tokenizer.to_str())
  tokenizer.add_special_tokens(['<s>'])
  start = tokenizer.token_to_id('<s>')
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', start)]
  )
  model = TriteraLM(latent._replace(tokenizer=tokenizer))
  plain = latent.tokenizer.encode('a b').ids
  assert model.prefix_token_id == start
  assert model.eot_token_id == 0
  assert model.tok_encode('a b') == [start, *plain]
  assert model.tok_encode('<s>a b') == [start, *plain]
  assert model.tok_encode('a b', add_special_tokens=False) == plain
  assert TriteraLM(latent).prefix_token_id == 0
  assert TriteraLM(latent).tok_encode('a b') == plain


@with_lm_eval
@pytest.mark.parametrize(
  ('stated', 'words'),
  [
    ({'num_beams': 4}, 'generation_kwargs has num_beams; understood are until'),
    ({'max_gen_toks': 64}, 'max_gen_toks=64 leaves no room for a prompt'),
    ({'do_sample': True, 'temperature': -1.0}, 'temperature=-1.0 must be'),
  ],
)
def test_generation_that_is_refused(latent, stated, words):
  from lm_eval.api.instance import Instance

  from tritera_jax.eval.adapter import TriteraLM

  asked = [Instance('generate_until', {}, ('a', stated), 0)]
  with pytest.raises(ValueError, match=words):
    TriteraLM(latent).generate_until(asked)


@with_lm_eval
def test_an_unknown_task_is_answered_with_the_nearest(random_run, monkeypatch):
  import lm_eval.tasks

  # lm-eval's own are thousands of files: here, the local ones are all.
  whole = lm_eval.tasks.TaskManager
  monkeypatch.setattr(
    lm_eval.tasks, 'TaskManager',
    lambda include_path=None, include_defaults=False: whole(
      include_path=include_path, include_defaults=False
    ),
  )  # fmt: skip
  with pytest.raises(ValueError, match=(
    "no task 'tritera_page' in lm_eval or .*; did you mean tritera_pages"
  )):  # fmt: skip
    harness.evaluate(random_run, ['tritera_page'], include=TASKS)


@pytest.mark.skipif(INSTALLED, reason='lm_eval is installed')
def test_without_lm_eval_what_would_bring_it_is_said(random_run, capsys):
  assert cli.main(['eval', str(random_run), '--tasks', 'paper']) == 1
  assert capsys.readouterr().err == (
    "tritera eval: tasks need lm_eval: pip install 'tritera_jax[eval]'\n"
  )


@pytest.mark.parametrize(
  ('tasks', 'more', 'words'),
  [
    ([], {}, 'no task; name some, or paper'),
    (['paper', 'piqa'], {}, 'tasks has piqa twice'),
    (['piqa'], {'limit': 0}, 'limit=0 must be >= 1'),
  ],
)
def test_what_is_refused_before_anything_is_read(tasks, more, words):
  with pytest.raises(ValueError, match=words):
    harness.evaluate('nowhere', tasks, **more)


def test_tasks_of_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='none is not a folder'):
    harness.evaluate('nowhere', ['piqa'], include=tmp_path / 'none')
