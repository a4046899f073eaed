# SPDX-License-Identifier: Apache-2.0
import functools

import numpy as np
import pytest

from tests.eval import numpy_scores
from tests.eval.conftest import MODEL
from tests.model import oracle
from tritera_jax.checkpoint import restore
from tritera_jax.eval import continuations
from tritera_jax.eval.continuations import Request

CONTEXT = [5, 6, 7]


@pytest.fixture(scope='module')
def requests():
  """Short and long ones; some are longer than the model's context of 64."""
  draw = np.random.default_rng(1)
  ids = lambda n: draw.integers(0, MODEL.vocab_size, n).tolist()
  sizes = [(1, 1), (3, 5), (16, 1), (59, 4), (62, 2), (63, 2), (70, 9), (2, 63)]
  return [Request(ids(context), ids(more)) for context, more in sizes]


def test_scores_are_those_of_a_scorer_in_numpy(
  random_run, latent, packed, requests
):
  experiment, params = restore.restore_params(random_run)
  score = lambda request: numpy_scores.continuation(
    experiment.model, params, *request
  )
  logits = oracle.decoder(experiment.model, params, np.array(CONTEXT))
  likeliest = int(logits[-1, : MODEL.vocab_size].argmax())
  asked = [*requests, Request(CONTEXT, [likeliest])]
  want = [score(request) for request in asked]
  assert want[-1][1] and not want[0][1]
  for loaded in (latent, packed):
    got = continuations.score(loaded.model, asked, batch_size=4)
    for (nats, is_greedy), found in zip(want, got, strict=True):
      assert found.log_likelihood == pytest.approx(nats, rel=1e-4)
      assert found.is_greedy == is_greedy


@pytest.mark.parametrize('kind', ['latent', 'packed'])
def test_scores_do_not_depend_on_what_is_beside(kind, request, requests):
  model = request.getfixturevalue(kind).model
  score = lambda asked, size: [
    found.log_likelihood
    for found in continuations.score(model, asked, batch_size=size)
  ]
  together = score(requests, 4)
  # At one batch size to the last bit, in whatever company and order.
  assert [score([one], 4)[0] for one in requests] == together
  assert score(requests[::-1], 4)[::-1] == together
  np.testing.assert_allclose(score(requests, 1), together, rtol=2e-6)


def test_what_is_read_alike_is_read_once(latent):
  """One-token choices after one context, as of most examinations."""
  seen = []
  progress = lambda batches: seen.extend(batches) or batches
  asked = [Request(CONTEXT, [token]) for token in range(40)]
  score = functools.partial(continuations.score, latent.model, batch_size=4)
  got = score(asked, progress=progress)
  [(length, rows)] = seen
  assert (length, len(rows), len(rows[0].requests)) == (16, 1, 40)
  for token in (0, 17, 39):
    assert score([asked[token]]) == [got[token]]


@pytest.mark.parametrize(
  ('context', 'continuation', 'words'),
  [
    ([], [1], 'request 1 has an empty context'),
    ([1], [], 'request 1 has an empty continuation'),
    ([1], [384], 'request 1: continuation has id 384, outside the vocabulary'),
    ([-1], [1], 'request 1: context has id -1'),
    ([1], [1] * 65, 'of 65 tokens, more than context_length=64'),
  ],
)
def test_requests_that_are_refused(latent, context, continuation, words):
  good = Request([1], [1])
  with pytest.raises(ValueError, match=words):
    continuations.score(latent.model, [good, Request(context, continuation)])
  with pytest.raises(ValueError, match='batch_size=0 must be'):
    continuations.score(latent.model, [good], batch_size=0)
