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
    problems = '; '.join(
      f'{".".join(map(str, e["loc"]))}: {e["msg"]}' for e in error.errors()
    )
    raise ValueError(f'{source}: {problems}') from None
