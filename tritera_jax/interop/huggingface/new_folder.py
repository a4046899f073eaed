# SPDX-License-Identifier: Apache-2.0
"""Folders that are there when all of them is."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil


def check(out: Path):
  """Refuses a folder that is there.

  Raises:
    FileExistsError: it is.
  """
  if out.exists():
    raise FileExistsError(f'{out} is there already; name a folder to be made')


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
  """OUT.partial, which becomes `out` at the end of the block, or is no more.

  What an interrupted one left there is deleted first.

  Raises:
    FileExistsError: `out` is there.
  """
  check(out)
  partial = out.with_name(f'{out.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
