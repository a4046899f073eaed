# SPDX-License-Identifier: Apache-2.0
"""Folders that are there when all of them is."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import shutil

_SUFFIX = '.tritera-partial'


def check(out: Path):
  """Refuses a folder that is there.

  Raises:
    FileExistsError: it is.
  """
  if out.exists():
    raise FileExistsError(f'{out} is there already; name a folder to be made')


def check_whole(folder: Path):
  """Refuses what an interrupted `whole` has left.

  Raises:
    ValueError: the folder is called so.
  """
  if folder.name.endswith(_SUFFIX):
    raise ValueError(
      f'{folder} was left by a command that was interrupted, and may lack '
      'parts; delete it, and run the command again'
    )


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
  """OUT.tritera-partial, which becomes `out` at the end, or is no more.

  A folder of that name, left by an interrupted one, is deleted first.

  Raises:
    FileExistsError: `out` is there.
  """
  check(out)
  partial = out.with_name(f'{out.name}{_SUFFIX}')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    yield partial
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
