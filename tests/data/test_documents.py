# SPDX-License-Identifier: Apache-2.0
import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tritera_jax.data import documents
from tritera_jax.data.documents import Part

TEXTS = ['one\n', 'zwei, drei\n日本', '', '\U0001f600' * 3, 'x' * 70_000]


def compress(ending: str, data: bytes) -> bytes:
  """By the libraries' own one-shot calls; in two members, end to end."""
  half = len(data) // 2
  packed = {
    '.gz': gzip.compress,
    '.zst': zstandard.ZstdCompressor().compress,
    '': bytes,
  }[ending]
  return packed(data[:half]) + packed(data[half:])


def write(folder, name: str, texts=TEXTS, field='text'):
  path = folder / name
  if name.endswith('.parquet'):
    table = pyarrow.table({'id': list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
  else:
    lines = [json.dumps({field: text, 'id': 7}) for text in texts]
    ending = path.suffix if path.suffix in ('.gz', '.zst') else ''
    path.write_bytes(compress(ending, '\n'.join(lines).encode()))
  [file] = documents.files(str(path))
  return file


def whole(parts: list[Part]) -> list[tuple[str, str]]:
  """Names and texts, parts joined."""
  found, text = [], ''
  for part in parts:
    text += part.text
    if part.ends:
      found.append((part.document, text))
      text = ''
  assert not text
  return found


NAMES = ['a.jsonl', 'a.jsonl.gz', 'a.jsonl.zst', 'a.json.gz', 'a.parquet']


@pytest.mark.parametrize('name', NAMES)
def test_every_row_is_a_document(tmp_path, name):
  file = write(tmp_path, name)
  parts = list(documents.read(file))
  assert whole(parts) == [(f'{name}:{i}', text) for i, text in enumerate(TEXTS)]
  offsets = [part.offset for part in parts]
  assert offsets == sorted(offsets) and offsets[-1] == file.size


@pytest.mark.parametrize('name', NAMES)
def test_the_field_that_holds_the_text_can_be_named(tmp_path, name):
  file = write(tmp_path, name, field='content')
  assert len(whole(list(documents.read(file, 'content')))) == len(TEXTS)
  with pytest.raises(ValueError, match=r"'text' in .*content.*--text-field"):
    list(documents.read(file))


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"text": "cut', r'a\.jsonl, line 2: .*delimiter|a\.jsonl, line 2: Unter'),
    ('["text"]', "line 2: no field 'text' in list"),
    ('{"text": 5}', "line 2: 'text' is int, wanted text"),
    (b'{"text": "\xff"}', "line 2: 'utf-8' codec"),
  ],
)
def test_a_line_that_is_not_as_it_should_be_is_named(tmp_path, line, message):
  line = line if isinstance(line, bytes) else line.encode()
  (tmp_path / 'a.jsonl').write_bytes(b'{"text": "fine"}\n' + line + b'\n')
  [file] = documents.files(str(tmp_path / 'a.jsonl'))
  with pytest.raises(ValueError, match=message):
    list(documents.read(file))


def test_null_and_half_a_surrogate_are_no_text(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": null}\n\n{"text": "\\ud800"}\n')
  [file] = documents.files(str(tmp_path / 'a.jsonl'))
  assert [part.text for part in documents.read(file)] == ['', '']


@pytest.mark.parametrize('ending', ['.gz', '.zst'])
def test_a_cut_or_damaged_file_is_an_error_and_not_an_end(tmp_path, ending):
  file = write(tmp_path, f'a.jsonl{ending}')
  data = file.path.read_bytes()
  file.path.write_bytes(data[:-9])
  with pytest.raises(ValueError, match=r'a\.jsonl.* is cut'):
    list(documents.read(file))
  file.path.write_bytes(b'no such thing' + data)
  with pytest.raises(ValueError, match=r'a\.jsonl.* is damaged'):
    list(documents.read(file))


def test_a_parquet_that_is_none_is_named(tmp_path):
  (tmp_path / 'a.parquet').write_bytes(b'PAR1 no')
  [file] = documents.files(str(tmp_path / 'a.parquet'))
  with pytest.raises(ValueError, match=r'a\.parquet: '):
    list(documents.read(file))


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
def test_a_long_text_comes_in_parts_cut_at_ends_of_lines(tmp_path, name):
  lines = [f'{"é" * (i % 900)} {i}\n' for i in range(9000)]
  text = ''.join(lines) + 'z' * 3_000_000 + '\nend'
  if name == 'a.txt':
    (tmp_path / name).write_text(text)
  else:
    (tmp_path / name).write_text(json.dumps({'text': text}))
  [file] = documents.files(str(tmp_path / name))
  parts = list(documents.read(file))
  assert ''.join(part.text for part in parts) == text
  assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
  assert max(len(part.text) for part in parts) <= 2**20
  cut_lines = [part for part in parts[:-1] if not part.text.endswith('\n')]
  assert all(set(part.text[-1000:]) == {'z'} for part in cut_lines)


def test_hidden_files_and_links_to_folders_are_left_out(tmp_path):
  for name in (
    '.git/config', 'b/a.txt', 'a.txt', '.hidden', '__pycache__/a.pyc',
  ):  # fmt: skip
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')
  (tmp_path / 'b' / 'loop').symlink_to(tmp_path)
  names = [file.name for file in documents.files(str(tmp_path))]
  assert names == ['a.txt', 'b/a.txt']


@pytest.mark.parametrize(
  ('name', 'module'),
  [('a.jsonl.zst', 'zstandard'), ('a.parquet', 'pyarrow')],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, name, module):
  file = write(tmp_path, name)
  for loaded in [m for m in sys.modules if m.split('.')[0] == module]:
    monkeypatch.setitem(sys.modules, loaded, None)
  with pytest.raises(ValueError, match=r'tritera_jax\[data\]'):
    list(documents.read(file))
