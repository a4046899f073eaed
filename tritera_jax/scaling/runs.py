# SPDX-License-Identifier: Apache-2.0
"""Finished runs as rows of a table: what laws are fitted to.

A table is JSON lines, `runs.jsonl`, which `tritera sweep` writes. Rows of
others' runs can be written by hand.
"""

from collections.abc import Iterable
import dataclasses
import json
from pathlib import Path
from typing import Literal
import uuid

import pydantic

from tritera_jax import validated

FILE = 'runs.jsonl'


@dataclasses.dataclass(frozen=True)
class Run:
  """One finished run.

  Attributes:
    name: unique in its table.
    family: of its weights.
    parameters: all of them, the vocabulary without padding, N.
    parameters_without_embeddings: without embedding and head.
    bits: of all parameters, as the papers count (Spectra, Table 4).
    tokens: trained on, repeated ones included, D.
    flops: of training, forward and backward.
    held_out_loss: nats a token.
    bits_per_byte: the same loss, in bits a byte of held-out text.
    seed: of initial parameters and of the order of data.
    seconds: that training took.
    held_out: fingerprints of the tokenizer and of the held-out tokens; None
      where nobody said.
  """

  name: str
  family: Literal['ternary', 'binary', 'float']
  parameters: int
  parameters_without_embeddings: int
  bits: float
  tokens: int
  flops: float
  held_out_loss: float
  bits_per_byte: float
  seed: int
  seconds: float
  held_out: str | None = None

  def __post_init__(self):
    for field in (
      'parameters', 'parameters_without_embeddings', 'bits', 'tokens',
      'flops', 'held_out_loss', 'bits_per_byte',
    ):  # fmt: skip
      value = getattr(self, field)
      if not 0 < value < float('inf'):
        raise ValueError(f'{field}={value} of {self.name} must be > 0')
    if self.parameters_without_embeddings > self.parameters:
      raise ValueError(
        f'parameters_without_embeddings={self.parameters_without_embeddings} '
        f'of {self.name} must be <= parameters={self.parameters}'
      )


_RUN = pydantic.TypeAdapter(Run)


def read(*places: str | Path) -> list[Run]:
  """The rows of tables, each a file or a folder with runs.jsonl.

  Raises:
    FileNotFoundError: there is no such table.
    ValueError: a row is not as it should be, two have one name, or there is
      none: file and line are named.
  """
  runs: dict[str, Run] = {}
  for place in places:
    file = Path(place)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
      raise FileNotFoundError(
        f'{file} is not there; `tritera sweep` writes {FILE} into its folder'
      )
    before = len(runs)
    for number, text in enumerate(_text(file).split('\n'), start=1):
      if not text.strip():
        continue
      run = parse(text, f'{file}, line {number}')
      if run.name in runs:
        raise ValueError(f'{file}, line {number}: a second run {run.name!r}')
      runs[run.name] = run
    if len(runs) == before:
      raise ValueError(f'no runs in {file}: it takes a row for each')
  return list(runs.values())


def _text(file: Path) -> str:
  try:
    return file.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{file} is not UTF-8 at byte {error.start}: give JSON lines, as '
      '`tritera sweep` writes them'
    ) from None


def parse(text: str, source: str) -> Run:
  """A row; a ValueError names `source` and what is wrong with it."""
  return validated.from_json(_RUN, text, source)


def write(folder: str | Path, runs: Iterable[Run]) -> Path:
  """Makes `runs` the table of a folder, at once: the last call's stands."""
  file = Path(folder) / FILE
  # A name of its own: the tasks of a job array write the same table.
  partial = file.with_name(f'{FILE}.{uuid.uuid4().hex}.partial')
  partial.write_text(''.join(f'{line(run)}\n' for run in runs))
  return partial.replace(file)


def line(run: Run) -> str:
  """A row as JSON; what nobody said is left out."""
  fields = dataclasses.asdict(run)
  return json.dumps({k: v for k, v in fields.items() if v is not None})
