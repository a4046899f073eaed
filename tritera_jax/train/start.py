# SPDX-License-Identifier: Apache-2.0
"""Parameters of another run to begin with: `run.start_from`."""

import dataclasses
import os

from jaxtyping import PyTree
import tokenizers

from tritera_jax.checkpoint import restore, save
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.experiment import Experiment

# What may change about parameters that go on: a FloatLM's become latents, and
# rounding begins. The rest says what they compute.
_MAY_DIFFER = {
  'family', 'activation_bits', 'scale_blocks', 'context_length', 'init_std',
  'document_separator', 'dtype',
  # What they are padded to is compared: an import counts rows, not tokens.
  'vocab_size', 'vocab_multiple',
}  # fmt: skip


def check(experiment: Experiment, tokenizer: tokenizers.Tokenizer):
  """Refuses a start that this run could not make sense of.

  Nothing is asked of it once the run has a checkpoint of its own.

  Raises:
    FileNotFoundError: run.start_from is not a run folder, or has no
      checkpoint.
    ValueError: its model or its tokenizer is another.
  """
  folder, run = experiment.run.start_from, experiment.run
  if not folder or save.latest_step(run.folder) is not None:
    return
  there = save.read_experiment(folder).model
  here, rows = experiment.model, there.padded_vocab_size
  if here.padded_vocab_size != rows:
    raise ValueError(
      f'run.start_from={folder} has {rows} rows of embedding, and model.'
      f'vocab_size={here.vocab_size} is padded to {here.padded_vocab_size}; '
      f'set --model.vocab-size {there.vocab_size} --model.vocab-multiple '
      f'{there.vocab_multiple} as there'
    )
  differing = [
    f'model.{field.name}: {old!r} there, {new!r} here'
    for field in dataclasses.fields(there)
    if field.name not in _MAY_DIFFER
    for old, new in [
      (getattr(there, field.name), getattr(experiment.model, field.name))
    ]
    if old != new
  ]
  if differing:
    raise ValueError(
      f'run.start_from={folder} is of another model ({"; ".join(differing)}); '
      'set these fields as there'
    )
  if save.latest_step(folder) is None:
    raise FileNotFoundError(
      f'run.start_from={folder} has no checkpoint yet; train it first'
    )
  file = os.path.join(folder, 'tokenizer.json')
  theirs = tokenizer_lib.load_tokenizer(file)
  if tokenizer_lib.fingerprint(theirs) != tokenizer_lib.fingerprint(tokenizer):
    raise ValueError(
      f'run.start_from={folder} has another tokenizer than '
      f'{experiment.data.path}; prepare the data with its: --tokenizer {file}'
    )


def parameters(experiment: Experiment, target: PyTree) -> tuple[PyTree, ...]:
  """The parameters of run.start_from as one element; none if it is ''.

  Args:
    experiment: of this run.
    target: parameters as ShapeDtypeStructs, with shardings.

  Raises:
    ValueError: see `restore.restore_start`.
  """
  folder = experiment.run.start_from
  return (restore.restore_start(folder, target),) if folder else ()
