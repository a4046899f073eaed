# SPDX-License-Identifier: Apache-2.0
"""Small files of a dataset, in a folder or in a bucket (gs://..., s3://...).

Credentials are found as Google's and Amazon's own tools find them.
AWS_ENDPOINT_URL names another server that speaks Amazon's protocol.
"""

import os
from pathlib import Path
import re
import shutil

import tensorstore as ts

# TensorStore repeats a request that was answered 429 or 5xx or not at all,
# after 1, 2, 4, ... 32 s: here for about three minutes, by default for
# fifteen, silently.
_RETRIES = {'max_retries': 10, 'initial_delay': '1s', 'max_delay': '32s'}
# A request whose answer never comes, because the server or the way to it is
# gone, counts as unanswered after 30 s without a byte; by default TensorStore
# waits as long as TCP does, half an hour (google/tensorstore#291).
for _name, _value in (
  ('CONNECT_TIMEOUT_SECONDS', '30'),
  ('LOW_SPEED_TIME_SECONDS', '30'),
  ('LOW_SPEED_LIMIT_BYTES', '1'),
):
  os.environ.setdefault(f'TENSORSTORE_CURL_{_name}', _value)


def context(**resources) -> ts.Context:
  """TensorStore's context for a dataset, with other resources beside."""
  retries = {'gcs_request_retries': _RETRIES, 's3_request_retries': _RETRIES}
  return ts.Context(retries | resources)


def kvstore(root: str | Path, path: str = '') -> str | dict:
  """Where TensorStore finds `path`; `root` is a folder or a URL."""
  scheme, separator, rest = str(root).partition('://')
  if not separator:
    return {'driver': 'file', 'path': f'{Path(root).resolve()}/{path}'}
  # Not as a URL, in which '#', '?' and '%' of a name mean something.
  if scheme in ('gs', 's3'):
    bucket, _, prefix = rest.rstrip('/').partition('/')
    path = f'{prefix}/{path}' if prefix else path
    spec = {'driver': scheme, 'bucket': bucket, 'path': path}
    if scheme == 'gs':
      return spec | {'driver': 'gcs'}
    endpoint = os.environ.get('AWS_ENDPOINT_URL')
    return spec | ({'endpoint': endpoint} if endpoint else {})
  return f'{str(root).rstrip("/")}/{path}'


def reason(error: ValueError) -> str:
  """What TensorStore says, without the specification of the array."""
  return re.sub(r" \[tensorstore_spec='(\\.|[^'\\])*'\]", '', str(error))


def unreadable(what: str, error: ValueError) -> ValueError | OSError:
  """The error to raise for TensorStore's when it was to read an array.

  A ValueError where something is damaged or missing; an OSError where it
  cannot be reached, or may not be.
  """
  text = f'{what}: {reason(error)}'
  if str(error).startswith(('DATA_LOSS', 'FAILED_PRECONDITION', 'NOT_FOUND')):
    return ValueError(f'{text}; the dataset is damaged: prepare again')
  return OSError(text)


def _open(root: str | Path, path: str = '') -> ts.KvStore:
  return ts.KvStore.open(kvstore(root, path), context=context()).result()


def read(root: str | Path, path: str) -> bytes | None:
  """The bytes of a file; None if there is none.

  Raises:
    OSError: it cannot be read.
  """
  try:
    found = _open(root).read(path).result()
  except ValueError as error:
    raise OSError(f'{root}/{path} cannot be read: {error}') from None
  return found.value if found.state == 'value' else None


def write(root: str | Path, path: str, data: bytes):
  """Writes a file, whole or not at all.

  Raises:
    OSError: it cannot be written.
  """
  try:
    _open(root).write(path, data).result()
  except ValueError as error:
    raise OSError(f'{root}/{path} cannot be written: {error}') from None


def names(root: str | Path, prefix: str) -> list[str]:
  """The files below a prefix, which ends with '/', named from `root`.

  Raises:
    OSError: they cannot be listed.
  """
  try:
    found = _open(root, prefix).list().result()
  except ValueError as error:
    raise OSError(f'{root}/{prefix} cannot be listed: {error}') from None
  return [prefix + name.decode() for name in found]


def delete(root: str | Path, prefix: str):
  """Deletes every file below a prefix, which ends with '/'.

  Raises:
    OSError: some cannot be deleted.
  """
  try:
    _open(root, prefix).delete_range(ts.KvStore.KeyRange()).result()
  except ValueError as error:
    raise OSError(f'{root}/{prefix} cannot be deleted: {error}') from None
  if '://' not in str(root):
    # Its folder, and the locks of a writer that was killed.
    shutil.rmtree(Path(root) / prefix, ignore_errors=True)
