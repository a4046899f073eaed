# SPDX-License-Identifier: Apache-2.0
"""The whole road on one small model: text, training, loss, bytes, words.

Run by `make quickstart`. Each step is a call that a notebook could make.
"""

import functools
from pathlib import Path
import sys
import time

import tqdm

from tritera_jax import experiment_file, show
from tritera_jax.checkpoint import pack, restore, save
from tritera_jax.data import prepare, shards
from tritera_jax.eval import baselines, perplexity
from tritera_jax.generate import load
from tritera_jax.train import loop, metrics

EXPERIMENT = 'experiments/quickstart.py'
FORMATS = ('two_bit', 'base_three')
PROMPT = 'class Stack:\n    """A last-in, first-out stack."""\n\n    def '
# Packed models run on the pure-JAX reference here: a part of the text does.
SUBSET_TOKENS = 16_384


def main(path: str = EXPERIMENT):
  started = time.perf_counter()
  experiment = experiment_file.load(path)
  run = Path(experiment.run.folder)
  say = functools.partial(print, flush=True)
  bar = functools.partial(tqdm.tqdm, unit='batch', leave=False, mininterval=1)

  say('\n1/5 prepare: the Python standard library, as tokens')
  summary = prepare.prepare(
    'stdlib',
    experiment.data.path,
    vocab_size=experiment.model.vocab_size,
  )
  say(summary)

  say(f'\n2/5 train: {path}\n{show.describe(experiment)}\n')
  before = save.latest_step(run)
  if before == experiment.run.steps:
    say(f'{run} is trained already ({before} steps); delete it to start anew')
  else:
    if before:
      say(f'resuming {run} after step {before}')
    try:
      loop.train(experiment)
    except loop.Stopped as stopped:
      say(f'\n{stopped}')
      return 128 + stopped.number
  say(f'loss curve: {metrics.plot(run)}')

  say('\n3/5 evaluate: held-out files, every token once')
  source = shards.open_split(experiment.data.path, 'validation')
  T = experiment.model.context_length
  latent = load.load(run)
  result = perplexity.held_out_loss(
    latent.model, source, sequence_length=T, progress=bar
  )
  say(
    f'{source.bytes:,} bytes, {source.tokens:,} tokens: '
    f'{result.nats_per_token:.4f} nats a token'
  )
  bits = {'this TriLM': result.bits_per_byte}
  bits |= baselines.all_baselines(experiment.data.path, 'validation')
  for name, value in sorted(bits.items(), key=lambda item: -item[1]):
    say(f'  {name:<12} {value:.3f} bits a byte')

  say('\n4/5 pack: five trits a byte, or two bits a trit')
  config, params = restore.restore_params(run)
  proof = pack.latent_fingerprint(config.model, params)
  say(f'  {"latent":<10} {proof}')
  for format in FORMATS:
    report = pack.pack(run, format)
    same = 'the same' if report.fingerprint == proof else 'DIFFERENT'
    say(
      f'  {format:<10} {report.fingerprint} ({same}), '
      f'{report.bits_per_weight:.3f} bits a weight, '
      f'{report.file_bytes / 1e6:.2f} MB in all'
    )

  say(f'\n5/5 generate: after {PROMPT!r}, the most likely tokens')
  score = functools.partial(
    perplexity.head_loss,
    source=source,
    sequence_length=T,
    tokens=SUBSET_TOKENS,
    progress=bar,
  )
  text = load.complete(latent, PROMPT, new_tokens=64)
  say(f'{PROMPT}{text}\n')
  say(f'  held-out loss of the first {SUBSET_TOKENS:,} tokens, nats a token')
  say(f'  {"latent":<10}        {score(latent.model):.5f}')
  agree = True
  for format in FORMATS:
    for activations in ('float', 'int8'):
      # The latents' own cache rounds nothing, nor does this one.
      packed = load.load(
        run / 'packed' / format, activations=activations, cache='float32'
      )
      note = ''
      if activations == 'float':
        same = load.complete(packed, PROMPT, new_tokens=64) == text
        agree &= same
        note = ', same text' if same else ', ANOTHER TEXT'
      nats = score(packed.model)
      say(f'  {format:<10} {activations:<5}  {nats:.5f}{note}')
  say(f'\ndone in {time.perf_counter() - started:.0f} s')
  return 0 if agree else 1


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
