# SPDX-License-Identifier: Apache-2.0
"""Small files of a dataset, in a folder or in a bucket (gs://..., s3://...)."""

from pathlib import Path
import shutil

import tensorstore as ts


def kvstore(root: str | Path, path: str = '') -> str | dict:
  """Where TensorStore finds `path`; `root` is a folder or a URL."""
  if '://' in str(root):
    return f'{str(root).rstrip("/")}/{path}'
  # Not as file://: in a URL, '#' and '%' of a folder's name mean something.
  return {'driver': 'file', 'path': f'{Path(root).resolve()}/{path}'}


def read(root: str | Path, path: str) -> bytes | None:
  """The bytes of a file; None if there is none.

  Raises:
    OSError: it cannot be read.
  """
  try:
    found = ts.KvStore.open(kvstore(root)).result().read(path).result()
  except ValueError as error:
    raise OSError(f'{root}/{path} cannot be read: {error}') from None
  return found.value if found.state == 'value' else None


def write(root: str | Path, path: str, data: bytes):
  """Writes a file, whole or not at all.

  Raises:
    OSError: it cannot be written.
  """
  try:
    ts.KvStore.open(kvstore(root)).result().write(path, data).result()
  except ValueError as error:
    raise OSError(f'{root}/{path} cannot be written: {error}') from None


def delete(root: str | Path, prefix: str):
  """Deletes every file below a prefix, which ends with '/'."""
  store = ts.KvStore.open(kvstore(root, prefix)).result()
  store.delete_range(ts.KvStore.KeyRange()).result()
  if '://' not in str(root):
    # Its folder, and the locks of a writer that was killed.
    shutil.rmtree(Path(root) / prefix, ignore_errors=True)
