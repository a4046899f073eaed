# SPDX-License-Identifier: Apache-2.0
"""JSON objects from outside: bounded, and without what JSON leaves open."""

import json
from pathlib import Path
from typing import Any, NoReturn

# Bytes of a config.json, of an index or of a header of safetensors. Python's
# objects take up to 20 times as much; those of a model of 10 000 tensors in one
# file take 1.5 MB.
LONGEST = 4 << 20


def read(path: Path) -> dict[str, Any]:
  """The object of a JSON file.

  Raises:
    ValueError: see `parse`; or the file is too long.
  """
  length = path.stat().st_size
  if length > LONGEST:
    raise ValueError(f'{path} has {length} bytes; at most {LONGEST} are read')
  return parse(path.read_bytes(), str(path))


def parse(text: bytes, where: str) -> dict[str, Any]:
  """The object of a JSON text; `where` stands in errors.

  Raises:
    ValueError: it is not JSON or no object, has a name twice in an object, or
      NaN or an infinity.
  """
  try:
    found = json.loads(
      text, object_pairs_hook=_without_repeats, parse_constant=_no_number
    )
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{where} cannot be read as JSON: {error}') from None
  if not isinstance(found, dict):
    raise ValueError(f'{where} holds {type(found).__name__}, wanted an object')
  return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    for name in found:
      names.remove(name)
    raise ValueError(f'the name {names[0]!r} occurs twice in an object')
  return found


def _no_number(constant: str) -> NoReturn:
  raise ValueError(f'{constant} is no number')
