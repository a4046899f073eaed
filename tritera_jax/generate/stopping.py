# SPDX-License-Identifier: Apache-2.0
"""Where a text that is being written ends, and what of it is sure already."""

from collections.abc import Sequence

_HALF = '\ufffd'  # what the bytes of an incomplete character decode to


def check(stop: Sequence[str]):
  """Refuses stop strings that mean nothing.

  Raises:
    ValueError: one of them is empty, or they are one string.
  """
  if isinstance(stop, str):
    raise ValueError(f'stop={stop!r} is one string; give ({stop!r},)')
  if '' in stop:
    raise ValueError(
      f'stop={tuple(stop)} has an empty string, which every text holds; '
      'leave it out'
    )


def settled(text: str, stop: Sequence[str], done: bool) -> tuple[str, bool]:
  """What of `text` no later token can change, and whether it ends there.

  Args:
    text: the decoded continuation so far.
    stop: the text ends before the first occurrence of any of them.
    done: no token follows.

  Returns:
    The start of `text` up to the first stop string or, if more tokens may
    follow, up to what may yet become one, or a character. True: that is all.
  """
  if not done:
    text = text.rstrip(_HALF)
  found = [start for start in map(text.find, stop) if start >= 0]
  end = min(found, default=len(text))
  if done:
    return text[:end], True
  # A longer stop string may begin before the one that was found.
  begun = min(
    (
      start
      for string in stop
      for start in range(max(0, len(text) - len(string) + 1), len(text))
      if string.startswith(text[start:])
    ),
    default=len(text),
  )
  return text[: min(end, begun)], bool(found) and end <= begun
