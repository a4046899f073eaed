# SPDX-License-Identifier: Apache-2.0
import json
import math
import subprocess

import numpy as np
import pytest
import tokenizers

from tests.model import oracle
from tritera_jax.checkpoint import restore
from tritera_jax.data import prepare, shards, tokenizer
from tritera_jax.eval import baselines, perplexity
from tritera_jax.generate import load


def log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_loss_is_that_of_the_numpy_decoder(tiny_data, tiny_run):
  experiment, params = restore.restore_params(tiny_run)
  source = shards.open_split(tiny_data, 'validation')
  tokens = [0, *source.read(0, 48).tolist()]
  # Windows of 32 that advance by 16: targets 0..31, then 32..47.
  nats = 0.0
  for start, scored in ((0, range(32)), (16, range(16, 32))):
    window = np.array(tokens[start : start + 32])
    losses = log_softmax(oracle.decoder(experiment.model, params, window))
    for t in scored:
      nats -= losses[t, tokens[start + t + 1]]
  got = perplexity.head_loss(
    load.load(tiny_run).model, source, tokens=48, sequence_length=32
  )
  assert got == pytest.approx(nats / 48, rel=1e-5)


def test_bits_and_nats(tiny_data, tiny_run):
  source = shards.open_split(tiny_data, 'validation')
  model = load.load(tiny_run).model
  result = perplexity.held_out_loss(model, source, sequence_length=32)
  assert result.tokens == source.tokens
  text = prepare.decode_split(tiny_data, 'validation')
  assert result.bytes == len(text)
  assert result.bits_per_byte == pytest.approx(
    result.nats_per_token * source.tokens / len(text) / math.log(2)
  )
  # Which windows share a batch does not matter.
  again = perplexity.held_out_loss(
    model, source, sequence_length=32, batch_size=7
  )
  assert again.nats == pytest.approx(result.nats, rel=1e-6)
  with pytest.raises(ValueError, match='sequence_length=64 exceeds'):
    perplexity.held_out_loss(model, source, sequence_length=64)


def test_evaluate_takes_what_the_run_says(tiny_data, tiny_run):
  source = shards.open_split(tiny_data, 'validation')
  model = load.load(tiny_run).model
  want = perplexity.held_out_loss(model, source, sequence_length=32)
  assert perplexity.evaluate(tiny_run) == want
  seen = []
  got = perplexity.evaluate(
    tiny_run, tiny_data, split='train', sequence_length=16, stride=16,
    batch_size=64, progress=lambda batches: seen.append(1) or iter(batches),
  )  # fmt: skip
  assert seen and got == perplexity.held_out_loss(
    model, shards.open_split(tiny_data, 'train'),
    sequence_length=16, stride=16, batch_size=64,
  )  # fmt: skip
  assert str(want) == (
    f'{want.nats / want.tokens:.4f} nats/token, '
    f'{want.nats / math.log(2) / want.bytes:.4f} bits/byte '
    f'({source.tokens:,} tokens, {source.bytes:,} bytes)'
  )


def test_evaluate_refuses_text_of_another_tokenizer(
  tiny_data, tiny_run, tmp_path
):
  """The vocabularies are of one size, so that nothing else would tell."""
  (tmp_path / 'corpus.txt').write_text('to be or not to be ' * 400)
  for i in range(20):
    (tmp_path / f'corpus{i}.txt').write_text(f'question {i} ' * 20)
  fields = json.loads((tiny_data / 'tokenizer.json').read_text())
  vocabulary = fields['model']['vocab']
  first, second, *_ = sorted(vocabulary)
  vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
  (tmp_path / 'other.json').write_text(json.dumps(fields))
  other = str(tmp_path / 'other')
  prepare.prepare(
    str(tmp_path), other, tokenizer=str(tmp_path / 'other.json'), holdout=0.4
  )
  wanted, found = (
    tokenizer.fingerprint(tokenizers.Tokenizer.from_file(str(file)))
    for file in (tiny_run / 'tokenizer.json', tmp_path / 'other.json')
  )
  with pytest.raises(ValueError, match=(
    f'tokenizer of {tiny_run} is {wanted}, that of {other} is {found}: .*'
    f'prepare the text again with --tokenizer {tiny_run}/tokenizer.json'
  )):  # fmt: skip
    perplexity.evaluate(tiny_run, other)


def test_evaluate_says_which_data_it_lacks(tiny_run, tmp_path):
  packed = tiny_run / 'packed' / 'two_bit'
  with pytest.raises(ValueError, match=f'{packed} is packed and .* --data'):
    perplexity.evaluate(packed)
  with pytest.raises(FileNotFoundError, match='is not a run folder'):
    perplexity.evaluate(tmp_path)


def test_baselines_are_the_programs_and_the_formula(tiny_data, tmp_path):
  text = prepare.decode_split(tiny_data, 'validation')
  got = baselines.all_baselines(tiny_data, 'validation')
  for name in ('gzip', 'xz'):
    size = len(
      subprocess.run(
        [name, '-9', '-c'], input=text, capture_output=True, check=True
      ).stdout
    )
    assert got[f'{name} -9'] == pytest.approx(8 * size / len(text), rel=0.02)
  counts = [1] * 384
  train = shards.open_split(tiny_data, 'train')
  for token in train.read(0, train.tokens).tolist():
    counts[token] += 1
  source = shards.open_split(tiny_data, 'validation')
  bits = sum(
    -math.log2(counts[token] / sum(counts))
    for token in source.read(0, source.tokens).tolist()
  )
  assert got['unigram'] == pytest.approx(bits / len(text))
