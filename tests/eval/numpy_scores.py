# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods by the NumPy decoder, a token at a time."""

import numpy as np

from tests.model import oracle


def log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def continuation(config, params, context, ids) -> tuple[float, bool]:
  """Nats, and whether each token was the likeliest."""
  context, ids = list(context), list(ids)
  text = (context + ids)[-(config.context_length + 1) :]
  found = log_softmax(oracle.decoder(config, params, np.array(text[:-1])))
  nats, greedy = 0.0, True
  for place in range(len(text) - 1 - len(ids), len(text) - 1):
    nats += found[place, text[place + 1]]
    greedy &= found[place, : config.vocab_size].argmax() == text[place + 1]
  return float(nats), bool(greedy)
