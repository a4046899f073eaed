# SPDX-License-Identifier: Apache-2.0
"""JSON from outside, checked against the dataclasses that it stands for."""

from typing import Any

import pydantic


def from_json(
  adapter: pydantic.TypeAdapter, text: str | bytes, source: str
) -> Any:
  """What `text` says: no field more, none of another type.

  Raises:
    ValueError: it is not; each problem is named by `source` and dotted field.
  """
  try:
    return adapter.validate_json(text, strict=True, extra='forbid')
  except pydantic.ValidationError as error:
    problems = '; '.join(map(_problem, error.errors()))
    raise ValueError(f'{source}: {problems}') from None


def _problem(error: Any) -> str:
  """Field and words; a dataclass's own words name their field."""
  where = '.'.join(map(str, error['loc']))
  words = error['msg'].removeprefix('Value error, ')
  return f'{where}: {words}' if where else words
