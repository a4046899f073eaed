# SPDX-License-Identifier: Apache-2.0
"""Loss on text that no dataset was made of, in the windows of one that was."""

from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path

import numpy as np

from tritera_jax.data import documents, loader
from tritera_jax.data.documents import File, Part
from tritera_jax.data.units import Encoder
from tritera_jax.eval import perplexity
from tritera_jax.eval.perplexity import HeldOutLoss, exponential
from tritera_jax.generate import load
from tritera_jax.train import loss
from tritera_kernels.matmul import Activations


@dataclasses.dataclass(frozen=True)
class TextLoss(HeldOutLoss):
  """Total loss of files; every token is scored once.

  Attributes:
    documents: that have text.
    words: what spaces and line ends separate, document ends left out.
    left_out: files of folders that are not UTF-8.
  """

  documents: int
  words: int
  left_out: tuple[str, ...] = ()

  @property
  def word_perplexity(self) -> float:
    """The exponential of all nats, those of document ends too, a word."""
    return exponential(self.nats / self.words)

  def __str__(self) -> str:
    lines = [
      super().__str__(),
      f'perplexity {self.perplexity:.4f} a token, '
      f'{self.word_perplexity:.4g} a word '
      f'({self.documents:,} documents, {self.words:,} words)',
    ]
    if self.left_out:
      lines.append(f'left out, not UTF-8: {", ".join(self.left_out)}')
    return '\n'.join(lines)


def evaluate(
  path: str | Path,
  files: Sequence[str | Path],
  *,
  text_field: str = 'text',
  sequence_length: int | None = None,
  stride: int | None = None,
  batch_size: int = 16,
  activations: Activations | None = None,
  progress=iter,
) -> TextLoss:
  """Loss of a run or a packed model on text.

  The text is what `tritera prepare` would make of it, one file after another:
  documents end with the end-of-text token, which is scored, and the model
  looks across their ends or not as it was trained. Windows and their scores
  are `perplexity.evaluate`'s.

  Args:
    path: run folder or packed folder.
    files: files, folders, or 'stdlib'; by their endings they are text or hold
      a document a line or row, as in `documents`.
    text_field: where a line's object or a row has its text.
    sequence_length: tokens a window; default: the model's context.
    stride: tokens scored a window; default: half a window.
    batch_size: windows at once.
    activations: of a packed model: 'float', 'bfloat16' or 'int8'; default: its
      record's.
    progress: wraps the iterable of batches, as tqdm does.

  Raises:
    FileNotFoundError: no such run, packed model or file.
    ValueError: there is no text, a line or row has none, one of `files` is not
      UTF-8, or an argument does not fit the model.
  """
  loaded = load.load(path, activations=activations)
  sizes = perplexity.window_sizes(loaded.model, sequence_length, stride)
  encoder = Encoder(loaded.tokenizer, loaded.end_of_text)
  left_out = []
  parts = (
    part
    for name in files
    for file in documents.files(str(name))
    for part in _read(file, text_field, Path(name).is_file(), left_out)
  )
  pieces, ends, size, words = [], 0, 0, 0
  for part, ids in encoder.encode(parts):
    if part.text:
      pieces.append(ids)
      ends += part.ends
      size += len(part.text.encode())
      words += len(part.text.split())
  if not words:
    raise ValueError(f'no text in {", ".join(map(str, files))}')
  ids = np.concatenate(pieces)
  windows = loader.windows_of(ids, encoder.end_of_text, *sizes)
  nats = loss.total_loss(loaded.model, windows, batch_size, progress)
  return TextLoss(nats, len(ids), size, ends, words, tuple(left_out))


def _read(
  file: File, text_field: str, named: bool, left_out: list[str]
) -> Iterator[Part]:
  """Parts of a file; one that is no text is refused or noted."""
  for part in documents.read(file, text_field):
    # Rows have names of their own.
    if part.document == file.name and not part.text and file.size:
      if named:
        raise ValueError(
          f'{file.path} is not UTF-8; convert it, or leave it out'
        )
      left_out.append(str(file.path))
    yield part
