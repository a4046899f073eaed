# SPDX-License-Identifier: Apache-2.0
"""A bucket in memory: what TensorStore asks of Google's and Amazon's servers.

Google: the JSON API (get, list, media upload, delete). Amazon: REST with
path-style names (GET, PUT, DELETE, ListObjectsV2). Signatures are not checked.

As a process of its own it serves the files of a folder as bucket 'bucket':

  python tests/data/bucket_server.py FOLDER PORT
"""

from collections.abc import Callable, Iterator
import hashlib
from http import server
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from urllib import error, parse, request
from xml.sax import saxutils

SILENCE = -1
# The server of moto, which is kept by others: what Amazon's protocol is does
# not depend on us. It has no Google's, and forgets its objects with its end.
MOTO = shutil.which(
  'moto_server', path=f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
)


class Bucket:
  """One bucket, behind both protocols; use it as a context.

  Attributes:
    objects: contents by name.
    requests: (method, path) of each request so far.
    refusals: the statuses to answer the next requests with; 0: as it should,
      SILENCE: not at all.
    page: objects in one page of a listing.
    url: of the server.
  """

  def __init__(self, name: str = 'bucket', page: int = 3, port: int = 0):
    self.name, self.page = name, page
    self.refusals: Iterator[int] = iter(())
    self.objects: dict[str, bytes] = {}
    self.requests: list[tuple[str, str]] = []
    self._server = server.ThreadingHTTPServer(
      ('127.0.0.1', port), type('Handler', (_Handler,), {'bucket': self})
    )
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    self.ended = threading.Event()

  def serve(self):
    """Until the process is killed."""
    self._server.serve_forever()

  def __enter__(self) -> 'Bucket':
    threading.Thread(target=self.serve, daemon=True).start()
    return self

  def __exit__(self, *_):
    self.ended.set()
    self._server.shutdown()
    self._server.server_close()

  def listed(self, wanted: Callable[[str], bool]) -> tuple[list[str], bool]:
    """A page of names, and whether there are more."""
    names = sorted(filter(wanted, self.objects))
    return names[: self.page], len(names) > self.page


class Server:
  """A process on a port of its own that serves what lies in a folder.

  Args:
    folder: its files are the objects of 'bucket'.
    moto: the path of moto's server, to take that in place of `Bucket`.
  """

  def __init__(self, folder: Path, moto: str | None = None):
    self.folder, self.moto = folder, moto
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self.port = free.getsockname()[1]
    self.url = f'http://127.0.0.1:{self.port}'
    self.start()

  def start(self):
    own = [sys.executable, __file__, str(self.folder)]
    command = [self.moto, '-p'] if self.moto else own
    self.process = subprocess.Popen(
      [*command, str(self.port)],
      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while True:
      try:
        self.ask('GET', '')
        break
      except error.HTTPError:
        break  # an answer too
      except OSError:
        assert self.process.poll() is None, 'the server does not start'
        time.sleep(0.05)
    if self.moto:
      self.ask('PUT', 'bucket')
      for file in filter(Path.is_file, self.folder.rglob('*')):
        name = file.relative_to(self.folder).as_posix()
        self.ask('PUT', f'bucket/{parse.quote(name)}', file.read_bytes())

  def ask(self, method: str, path: str, data: bytes | None = None):
    kind = {'Content-Type': 'application/octet-stream'}
    asked = request.Request(f'{self.url}/{path}', data, kind, method=method)
    request.urlopen(asked, timeout=10).close()

  def outage(self, how: str, seconds: float):
    if how == 'hangs':
      self.process.send_signal(signal.SIGSTOP)
      time.sleep(seconds)
      self.process.send_signal(signal.SIGCONT)
    else:
      self.end()
      time.sleep(seconds)
      self.start()

  def end(self):
    self.process.kill()
    self.process.wait()


def environment(url: str) -> dict[str, str]:
  """Variables that send TensorStore there; it reads them once a process."""
  return {
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    'AWS_ENDPOINT_URL': url,
    'AWS_REGION': 'us-east-1',
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_EC2_METADATA_DISABLED': 'true',
  }


def _generation(data: bytes) -> str:
  """Of an object: the same bytes, the same generation."""
  return str(int.from_bytes(hashlib.sha256(data).digest()[:6], 'big') + 1)


class _Handler(server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  bucket: Bucket

  def log_message(self, format, *arguments):
    pass

  def _answer(self, status: int, body: bytes = b'', **headers: str):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def _handle(self):
    body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    self.bucket.requests.append((self.command, self.path))
    url = parse.urlsplit(self.path)
    query = dict(parse.parse_qsl(url.query, keep_blank_values=True))
    google, upload = '/storage/v1/b/', '/upload/storage/v1/b/'
    status = next(self.bucket.refusals, 0)
    if status == SILENCE:
      self.bucket.ended.wait()
      return
    if status:
      # Google's errors are JSON, Amazon's XML.
      error = {'error': {'code': status, 'message': 'refused'}}
      self._answer(
        status,
        json.dumps(error).encode()
        if google in self.path
        else b'<Error><Code>Refused</Code></Error>',
      )
      return
    if url.path.startswith(upload):
      self._google(url.path.removeprefix(upload), query, body)
    elif url.path.startswith(google):
      self._google(url.path.removeprefix(google), query, body)
    else:
      self._amazon(url.path.removeprefix('/'), query, body)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

  def _google(self, path: str, query: dict[str, str], body: bytes):
    objects = self.bucket.objects
    bucket, _, name = path.partition('/o')
    name = parse.unquote(name.removeprefix('/'))
    if bucket != self.bucket.name:
      self._answer(404, b'no such bucket')
    elif self.command == 'POST':
      name = query['name']
      objects[name] = body
      self._answer(200, self._google_fields(name))
    elif not name:
      names, more = self.bucket.listed(
        lambda name: (
          name.startswith(query.get('prefix', ''))
          and query.get('startOffset', '') <= name
          and name < query.get('endOffset', chr(0x10FFFF))
          and name > bytes.fromhex(query.get('pageToken', '')).decode()
        )
      )
      fields: dict = {
        'items': [json.loads(self._google_fields(name)) for name in names]
      }
      if more:
        # Google's too are such that TensorStore need not escape them in a URL,
        # which it does not.
        fields['nextPageToken'] = names[-1].encode().hex()
      self._answer(200, json.dumps(fields).encode())
    elif name not in objects:
      self._answer(404, b'no such object')
    elif self.command == 'DELETE':
      del objects[name]
      self._answer(204)
    elif query.get('alt') == 'media':
      self._content(name, x_goog_generation=_generation(objects[name]))
    else:
      self._answer(200, self._google_fields(name))

  def _google_fields(self, name: str) -> bytes:
    data = self.bucket.objects[name]
    return json.dumps({
      'name': name, 'generation': _generation(data), 'size': str(len(data)),
      'metageneration': '1',
    }).encode()  # fmt: skip

  def _content(self, name: str, **headers: str):
    """The object, or the range of it that is asked for."""
    data = self.bucket.objects[name]
    wanted = self.headers.get('Range')
    if not wanted:
      self._answer(200, data, **headers)
      return
    first, _, last = wanted.removeprefix('bytes=').partition('-')
    begin = int(first) if first else max(0, len(data) - int(last))
    end = min(len(data), int(last) + 1) if first and last else len(data)
    span = f'bytes {begin}-{end - 1}/{len(data)}'
    self._answer(206, data[begin:end], Content_Range=span, **headers)

  def _amazon(self, path: str, query: dict[str, str], body: bytes):
    objects = self.bucket.objects
    bucket, _, name = path.partition('/')
    name = parse.unquote(name)
    if bucket != self.bucket.name:
      self._answer(404, b'<Error><Code>NoSuchBucket</Code></Error>')
    elif self.command == 'PUT':
      objects[name] = body
      self._answer(200, ETag=f'"{_generation(body)}"')
    elif not name and self.command == 'HEAD':
      self._answer(200, x_amz_bucket_region='us-east-1')
    elif not name:
      self._amazon_list(query)
    elif self.command == 'DELETE':
      objects.pop(name, None)
      self._answer(204)
    elif name not in objects:
      self._answer(404, b'<Error><Code>NoSuchKey</Code></Error>')
    else:
      self._content(name, ETag=f'"{_generation(objects[name])}"')

  def _amazon_list(self, query: dict[str, str]):
    names, more = self.bucket.listed(
      lambda name: (
        name.startswith(query.get('prefix', ''))
        and name > query.get('start-after', '')
        and name > query.get('continuation-token', '')
      )
    )
    contents = ''.join(
      f'<Contents><Key>{saxutils.escape(name)}</Key>'
      f'<Size>{len(self.bucket.objects[name])}</Size></Contents>'
      for name in names
    )
    token = (
      f'<NextContinuationToken>{saxutils.escape(names[-1])}'
      '</NextContinuationToken>'
      if more
      else ''
    )
    self._answer(
      200,
      '<?xml version="1.0"?><ListBucketResult>'
      f'<KeyCount>{len(names)}</KeyCount>'
      f'<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}'
      '</ListBucketResult>'.encode(),
    )


if __name__ == '__main__':
  folder = Path(sys.argv[1])
  bucket = Bucket(port=int(sys.argv[2]))
  for file in folder.rglob('*'):
    if file.is_file():
      name = file.relative_to(folder).as_posix()
      bucket.objects[name] = file.read_bytes()
  bucket.serve()
