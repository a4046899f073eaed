# SPDX-License-Identifier: Apache-2.0
"""A model to use, from a run folder or a packed one."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import tokenizers

from tritera_jax.checkpoint import pack, restore
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.generate import engine, packed
from tritera_jax.generate.sampling import Sampling
from tritera_jax.model import decoder, quantized
from tritera_jax.model.decoder import Decoder
from tritera_kernels.matmul import Activations


class Loaded(NamedTuple):
  model: Decoder
  tokenizer: tokenizers.Tokenizer


def load(
  path: str | Path,
  *,
  step: int | None = None,
  activations: Activations | None = None,
) -> Loaded:
  """Model and tokenizer of a run folder or a packed folder.

  Args:
    path: a run's folder (its latents are quantised once), or a packed one.
    step: of a run: which checkpoint; default: the newest.
    activations: of a packed model: 'float' or 'int8'; default: its record's.

  Raises:
    FileNotFoundError: neither kind of folder, or no such checkpoint.
    ValueError: damaged or unfit content, or an argument of the other kind.
  """
  path = Path(path)
  tokenizer = tokenizer_lib.load_tokenizer(path / 'tokenizer.json')
  if (path / 'model.safetensors').exists():
    if step is not None:
      raise ValueError(f'step={step}, but {path} is packed: it has no steps')
    return Loaded(packed.bind(pack.read(path), activations), tokenizer)
  if activations is not None:
    raise ValueError(
      f'activations={activations!r} is for packed models; pack {path} first'
    )
  experiment, params = restore.restore_params(path, step)
  effective = jax.jit(quantized.effective_params, static_argnums=0)(
    experiment.model, params
  )
  config = dataclasses.replace(experiment.model, family='float')
  return Loaded(decoder.bind(config, effective), tokenizer)


def complete(
  loaded: Loaded,
  prompt: str,
  *,
  new_tokens: int,
  sampling: Sampling = Sampling(),
  seed: int = 0,
) -> str:
  """The text that continues `prompt`, without it.

  An empty prompt starts a document. A prompt past the context keeps its end.
  """
  stop = tokenizer_lib.end_of_text_id(loaded.tokenizer)
  ids = loaded.tokenizer.encode(prompt).ids or [stop]
  room = loaded.model.config.context_length - new_tokens
  [continuation] = engine.generate(
    loaded.model,
    [ids[-max(room, 1) :]],
    new_tokens=new_tokens,
    stop=stop,
    sampling=sampling,
    seed=seed,
  )
  return loaded.tokenizer.decode(continuation)
