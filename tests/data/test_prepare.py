# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
import sysconfig
import tokenize

import numpy as np
import pytest
import tensorstore as ts
import tokenizers

from tritera_jax.data import documents, prepare, shards, tokenizer, units

TEXTS = {
  f'{name}.py': f'# {name}\ndef {name}(x):\n    return x + {i}  # ünïcödé\n'
  for i, name in enumerate(
    'alpha beta gamma delta epsilon zeta eta theta iota kappa'.split()
  )
}


@pytest.fixture
def corpus(tmp_path) -> Path:
  folder = tmp_path / 'corpus'
  (folder / 'deep').mkdir(parents=True)
  for i, (name, text) in enumerate(TEXTS.items()):
    (folder / ('deep' if i % 2 else '.') / name).write_text(text)
  (folder / 'binary.dat').write_bytes(b'\xff\xfe\x00')
  (folder / 'empty.txt').write_text('')
  return folder


@pytest.fixture
def dataset(corpus, tmp_path) -> Path:
  prepare.prepare(
    str(corpus), str(tmp_path / 'data'), vocab_size=300, holdout=0.3
  )
  return tmp_path / 'data'


def raw(dataset: Path, path: str) -> np.ndarray:
  """An array read by TensorStore straight from its files."""
  kvstore = {'driver': 'file', 'path': f'{dataset}/{path}/'}
  return (
    ts.open({'driver': 'zarr3', 'kvstore': kvstore}).result().read().result()
  )


def test_shards_hold_every_document_in_order_and_its_end(dataset, corpus):
  tok = tokenizers.Tokenizer.from_file(str(dataset / 'tokenizer.json'))
  manifest = json.loads((dataset / 'manifest.json').read_text())
  seen = []
  for split in ('train', 'validation'):
    tokens = raw(dataset, f'{split}/00000-000.tokens.zarr3')
    ends = raw(dataset, f'{split}/00000-000.ends.zarr3')
    assert tokens.dtype == np.uint16 and ends.dtype == np.uint64
    texts = []
    for start, end in itertools.pairwise([0, *ends.tolist()]):
      assert tokens[end - 1] == tok.token_to_id('<|endoftext|>') == 0
      document = tokens[start : end - 1].tolist()
      texts.append(tok.decode(document))
      assert document == tok.encode(texts[-1]).ids
    [entry] = manifest['splits'][split]
    assert entry['documents'] == len(texts)
    assert entry['tokens'] == tokens.size
    assert entry['bytes'] == sum(len(t.encode()) for t in texts)
    assert prepare.decode_split(dataset, split) == ''.join(texts).encode()
    seen += texts
  assert sorted(seen) == sorted(TEXTS.values())


def test_the_arrays_are_zarr_that_others_can_read(tmp_path):
  """Decoded by hand from the zarr 3 text: sharding_indexed, bytes, crc32c."""
  tokens = (np.arange(40_000) * 7 % 60_000).astype(np.uint16)
  tokens[:20_000] = 0  # a chunk of zeros must lie there like any other
  shards.write_shard(tmp_path, 'train/00000-000', tokens, np.array([40_000]), 1)
  array = tmp_path / 'train/00000-000.tokens.zarr3'
  meta = json.loads((array / 'zarr.json').read_text())
  assert meta['zarr_format'] == 3 and meta['data_type'] == 'uint16'
  assert meta['shape'] == [40_000]
  [sharding] = meta['codecs']
  assert sharding['name'] == 'sharding_indexed'
  [chunk] = sharding['configuration']['chunk_shape']
  for codecs in ('codecs', 'index_codecs'):
    names = [c['name'] for c in sharding['configuration'][codecs]]
    assert names == ['bytes', 'crc32c']
  [file] = meta['chunk_grid']['configuration']['chunk_shape']
  assert file >= 40_000  # so one file holds all
  data = (array / 'c' / '0').read_bytes()
  count = file // chunk
  # The index is at the end: offset and length of each chunk, and 4 bytes of
  # checksum, which each chunk has too.
  index = np.frombuffer(data[-16 * count - 4 : -4], '<u8').reshape(-1, 2)
  parts = [np.frombuffer(data[o : o + n - 4], '<u2') for o, n in index.tolist()]
  np.testing.assert_array_equal(np.concatenate(parts)[:40_000], tokens)
  assert len(parts) == 3 and chunk == 2**14


def damage(file: Path, how: str):
  data = file.read_bytes()
  file.unlink()
  if how == 'flip':
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
  elif how == 'cut':
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize('how', ['flip', 'cut', 'remove'])
def test_damaged_tokens_are_an_error_and_never_zeros(dataset, how):
  damage(dataset / 'train/00000-000.tokens.zarr3/c/0', how)
  source = shards.open_split(dataset, 'train')
  with pytest.raises(ValueError, match='is damaged: prepare again'):
    source.read(0, 1)


def test_a_dataset_may_be_named_by_url_and_lie_in_any_folder(dataset, tmp_path):
  tokens = raw(dataset, 'train/00000-000.tokens.zarr3')
  odd = dataset.rename(tmp_path / 'data #1 100%20')
  for root in (odd, str(odd)):
    source = shards.open_split(root, 'train')
    np.testing.assert_array_equal(source.read(0, source.tokens), tokens)
  source = shards.open_split(f'file://{odd.rename(tmp_path / "x")}', 'train')
  np.testing.assert_array_equal(source.read(0, source.tokens), tokens)


def test_the_held_out_files_stay_when_others_come(dataset, corpus, tmp_path):
  before = prepare.decode_split(dataset, 'validation')
  assert before
  (corpus / 'later_a.py').write_text('a = 1\n')
  names = [p.relative_to(corpus).as_posix() for p in corpus.rglob('*.py')]
  held = {n for n in names if units.held_out(n, 0.3)}
  assert {Path(n).name for n in held} - {'later_a.py'} == {
    name for name, text in TEXTS.items() if text.encode() in before
  }


def test_again_it_finds_what_is_there_and_other_arguments_are_refused(
  corpus, dataset
):
  before = (dataset / 'manifest.json').stat().st_mtime_ns
  prepare.prepare(str(corpus), str(dataset), vocab_size=300, holdout=0.3)
  assert (dataset / 'manifest.json').stat().st_mtime_ns == before
  with pytest.raises(ValueError, match='vocab_size: 300 there, 301 here'):
    prepare.prepare(str(corpus), str(dataset), vocab_size=301, holdout=0.3)


def test_pieces_are_as_they_always_were_unless_they_are_chosen(
  corpus, dataset, tmp_path
):
  """A finished dataset of before there was a choice is found again."""
  said = json.loads((dataset / 'tokenizer.json').read_text())
  assert said['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex'] == (
    r'\s*\n[ \t]*| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}_\p{N}]+|\s+'
  )
  assert said['model']['ignore_merges'] is False
  assert (
    'pieces'
    not in json.loads((dataset / 'manifest.json').read_text())['recipe']
  )
  out = tmp_path / 'llama'
  prepare.prepare(
    str(corpus), str(out), vocab_size=300, holdout=0.3, pieces='llama-3'
  )
  tok = tokenizers.Tokenizer.from_file(str(out / 'tokenizer.json'))
  cut = tok.pre_tokenizer.pre_tokenize_str("it's\n  x")
  assert [span for _, span in cut] == [(0, 2), (2, 4), (4, 5), (5, 6), (6, 8)]
  with pytest.raises(ValueError, match="pieces: 'llama-3' there, None here"):
    prepare.prepare(str(corpus), str(out), vocab_size=300, holdout=0.3)
  with pytest.raises(ValueError, match="pieces='gpt-2' is for a tokenizer"):
    prepare.prepare(
      str(corpus),
      str(tmp_path / 'new'),
      tokenizer=str(out / 'tokenizer.json'),
      pieces='gpt-2',
    )


def test_a_given_tokenizer_is_used_as_it_is(corpus, dataset, tmp_path):
  other = tmp_path / 'again'
  prepare.prepare(
    str(corpus), str(other), holdout=0.3,
    tokenizer=str(dataset / 'tokenizer.json'),
  )  # fmt: skip
  for split in ('train', 'validation'):
    path = f'{split}/00000-000.tokens.zarr3'
    np.testing.assert_array_equal(raw(other, path), raw(dataset, path))


def test_the_end_of_text_token_in_a_text_ends_nothing(corpus, tmp_path):
  text = 'x = "<|endoftext|>"\n'
  (corpus / 'spelled.py').write_text(text)
  prepare.prepare(
    str(corpus), str(tmp_path / 'out'), vocab_size=300, holdout=0.3
  )
  decoded = b''
  for split in ('train', 'validation'):
    source = shards.open_split(tmp_path / 'out', split)
    tokens = source.read(0, source.tokens)
    assert np.count_nonzero(tokens == 0) == source.documents
    decoded += prepare.decode_split(tmp_path / 'out', split)
  assert text.encode() in decoded


def test_what_a_given_tokenizer_does_beside_tokenising_is_undone(
  corpus, dataset, tmp_path
):
  given = tokenizers.Tokenizer.from_file(str(dataset / 'tokenizer.json'))
  given.enable_truncation(5)
  given.enable_padding(length=8)
  fields = json.loads(given.to_str())
  vocabulary = fields['model']['vocab']
  vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000  # leaves a hole
  (tmp_path / 'given.json').write_text(json.dumps(fields))
  prepare.prepare(
    str(corpus), str(tmp_path / 'out'), holdout=0.3,
    tokenizer=str(tmp_path / 'given.json'),
  )  # fmt: skip
  for split in ('train', 'validation'):
    source = shards.open_split(tmp_path / 'out', split)
    source.verify()
    assert source.vocab_size == 70_001
    assert source.manifest.dtype == 'uint32'
    text = prepare.decode_split(dataset, split)
    assert prepare.decode_split(tmp_path / 'out', split) == text


def test_without_a_holdout_there_is_one_split(corpus, dataset, tmp_path):
  out = tmp_path / 'out'
  summary = prepare.prepare(str(corpus), str(out), vocab_size=300, holdout=0.0)
  assert 'validation' not in str(summary)
  assert not (out / 'validation').exists()
  assert sorted(
    prepare.decode_split(out, 'train').decode().splitlines()
  ) == sorted(''.join(TEXTS.values()).splitlines())
  with pytest.raises(ValueError, match=r"'validation'; it has \['train'\]"):
    shards.open_split(out, 'validation')
  # A dataset of two splits is not turned into one of one.
  with pytest.raises(ValueError, match='holdout: 0.3 there, 0.0 here'):
    prepare.prepare(str(corpus), str(dataset), vocab_size=300, holdout=0.0)


@pytest.mark.parametrize(
  ('holdout', 'split'), [(1e-9, 'validation'), (1 - 1e-9, 'train')]
)
def test_a_split_without_text_is_refused(corpus, tmp_path, holdout, split):
  out = str(tmp_path / 'out')
  with pytest.raises(ValueError, match=(
    f'no text in the {split} split of 12 files; change holdout={holdout} '
    r'\(0 for no validation split\), or give more documents'
  )):  # fmt: skip
    prepare.prepare(str(corpus), out, vocab_size=300, holdout=holdout)
  # What is there by now is of no harm to a better call.
  prepare.prepare(str(corpus), out, vocab_size=300, holdout=0.3)
  again = str(tmp_path / 'again')
  prepare.prepare(str(corpus), again, vocab_size=300, holdout=0.3)
  left, right = (
    {f.relative_to(folder): f.read_bytes()
     for f in Path(folder).rglob('*') if f.is_file()}
    for folder in (out, again)
  )  # fmt: skip
  assert left == right


def test_documents_that_are_left_out_are_counted(corpus, tmp_path):
  rows = [
    '{"text": ""}',
    '{"text": null}',
    '{"text": "\\ud800"}',
    '{"text": "x"}',
  ]
  (corpus / 'rows.jsonl').write_text('\n'.join(rows))
  summary = prepare.prepare(
    str(corpus), str(tmp_path / 'out'), vocab_size=300, holdout=0.3
  )
  # binary.dat, empty.txt and three rows.
  assert json.loads((tmp_path / 'out/manifest.json').read_text())[
    'left_out'] == 5  # fmt: skip
  assert 'left out   5 documents that are empty or not text' in str(summary)
  assert (
    sum(
      shards.open_split(tmp_path / 'out', split).documents
      for split in ('train', 'validation')
    )
    == len(TEXTS) + 1
  )


@pytest.mark.parametrize('data', [
  b'# coding: rot13\nx\n', b'# coding: no-such\nx\n', b'x = "\xff"\n',
  b'# coding: unicode_escape\nx = "\\ud800"\n',
])  # fmt: skip
def test_a_file_that_is_not_text_is_left_out(corpus, dataset, tmp_path, data):
  (corpus / 'odd.py').write_bytes(data)
  prepare.prepare(
    str(corpus), str(tmp_path / 'out'), vocab_size=300, holdout=0.3
  )
  for split in ('train', 'validation'):
    text = prepare.decode_split(dataset, split)
    assert prepare.decode_split(tmp_path / 'out', split) == text


def test_progress_is_told_in_bytes_of_files(corpus, tmp_path):
  told = []
  prepare.prepare(
    str(corpus), str(tmp_path / 'out'), vocab_size=300, holdout=0.3,
    progress=lambda done, total: told.append((done, total)),
  )  # fmt: skip
  size = sum(f.stat().st_size for f in corpus.rglob('*') if f.is_file())
  assert told[-1] == (size, size) and told == sorted(told)


@pytest.mark.parametrize('text', [
  'def f(x):\n\treturn  x\n\n\n', 'naïve 日本 \U0001f600\r\n', '\0', ' ', '',
])  # fmt: skip
def test_any_text_survives_the_tokenizer(text):
  tok = tokenizer.train_tokenizer(TEXTS.values(), 280)
  assert tok.decode(tok.encode(text).ids, skip_special_tokens=False) == text


def test_the_same_texts_give_the_same_tokenizer():
  a, b = (tokenizer.train_tokenizer(TEXTS.values(), 300) for _ in range(2))
  assert tokenizer.fingerprint(a) == tokenizer.fingerprint(b)
  c = tokenizer.train_tokenizer(TEXTS.values(), 301)
  assert tokenizer.fingerprint(c) != tokenizer.fingerprint(a)


def test_threads_and_hashes_do_not_change_the_tokenizer():
  program = (
    'from tests.data.test_prepare import TEXTS\n'
    'from tritera_jax.data import tokenizer as t\n'
    'print(t.train_tokenizer(TEXTS.values(), 300).to_str())'
  )
  paths = str(Path(__file__).parents[2])
  saved = {
    subprocess.run(
      [sys.executable, '-c', program],
      env={
        **os.environ, 'PYTHONPATH': paths, 'PYTHONHASHSEED': str(threads),
        'RAYON_NUM_THREADS': str(threads),
      },
      check=True, capture_output=True,
    ).stdout
    for threads in (1, 2)
  }  # fmt: skip
  assert len(saved) == 1


def test_the_standard_library_survives_to_the_byte(tmp_path):
  """Against its files, found and read by other means than prepare's."""
  prepare.prepare('stdlib', str(tmp_path / 'data'), vocab_size=512)
  names, documents = [], {}
  root = sysconfig.get_path('stdlib')
  for folder, folders, files in os.walk(root):
    folders[:] = set(folders) - {
      'test', 'tests', 'idle_test', 'site-packages', 'dist-packages',
      'pydoc_data',
    }  # fmt: skip
    names += [os.path.join(folder, f) for f in files if f.endswith('.py')]
  for name in names:
    try:
      with tokenize.open(name) as file:
        documents[Path(name)] = file.read().encode()
    except (SyntaxError, UnicodeDecodeError):
      pass
  wanted = sorted(name for name, text in documents.items() if text)
  held_out = prepare.decode_split(tmp_path / 'data', 'validation')
  train = prepare.decode_split(tmp_path / 'data', 'train')
  place = {'train': 0, 'validation': 0}
  for name in wanted:
    text = documents[name]
    for split, whole in (('train', train), ('validation', held_out)):
      start = place[split]
      if whole[start : start + len(text)] == text:
        place[split] += len(text)
        break
    else:
      raise AssertionError(f'{name} is in neither split at its place')
  assert place == {'train': len(train), 'validation': len(held_out)}
  for split, text in (('train', train), ('validation', held_out)):
    source = shards.open_split(tmp_path / 'data', split)
    source.verify()
    assert source.bytes == len(text)


def test_the_standard_library_is_found_without_its_tests():
  names = {Path(file.name) for file in documents.files('stdlib')}
  assert Path('json/decoder.py') in names and len(names) > 400
  for out in ('test', 'tests', 'site-packages'):
    assert not [name for name in names if out in name.parts]


def broken(dataset: Path, **changes):
  file = dataset / 'manifest.json'
  manifest = json.loads(file.read_text())
  for key, value in changes.items():
    if key in ('tokens', 'path', 'sha256'):
      manifest['splits']['train'][0][key] = value
    else:
      manifest[key] = value
  file.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'version': 2}, 'version is 2, wanted 1'),
    ({'kind': 'other'}, "kind is 'other'"),
    ({'dtype': 'uint32'}, "dtype is 'uint32', wanted 'uint16'"),
    ({'vocab_size': '300'}, 'vocab_size: Input should be a valid integer'),
    ({'end_of_text': 300}, 'end_of_text is 300, wanted an id'),
    ({'extra': 1}, 'extra: Unexpected keyword argument'),
    ({'tokens': 7}, r'the manifest says uint16\[7\]'),
    ({'tokens': -1}, 'train/00000-000: a count is negative'),
    ({'path': '../train/00000'}, 'leaves the dataset'),
    ({'path': 'train/00001'}, 'cannot be opened'),
  ],
)
def test_a_manifest_that_lies_is_refused(dataset, changes, message):
  broken(dataset, **changes)
  with pytest.raises(ValueError, match=message):
    shards.open_split(dataset, 'train').read(0, 1)


def test_tokens_that_are_not_the_manifests_are_found(dataset):
  source = shards.open_split(dataset, 'train')
  source.verify()
  largest = int(source.read(0, source.tokens).max())
  broken(dataset, vocab_size=largest)
  with pytest.raises(
    ValueError, match=f'has id {largest}, past the vocabulary of {largest}'
  ):
    shards.open_split(dataset, 'train').read(0, source.tokens)
  broken(dataset, vocab_size=300, sha256='0' * 64)
  with pytest.raises(ValueError, match='does not match its digest'):
    shards.open_split(dataset, 'train').verify()


def test_a_tokenizer_that_is_not_the_datasets_is_refused(dataset):
  file = dataset / 'tokenizer.json'
  fields = json.loads(file.read_text())
  # How the JSON is written does not matter.
  file.write_text(json.dumps(fields, sort_keys=True))
  before = prepare.decode_split(dataset, 'train')
  vocabulary = fields['model']['vocab']
  vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
  file.write_text(json.dumps(fields))
  assert tokenizer.load_tokenizer(file).decode([vocabulary['a']]) == 'a'
  for call in (
    lambda: shards.read_tokenizer(dataset),
    lambda: prepare.decode_split(dataset, 'train'),
  ):
    with pytest.raises(ValueError, match=(
      r'tokenizer\.json is [0-9a-f]{64}, the manifest says [0-9a-f]{64}; the '
      'dataset is damaged'
    )):  # fmt: skip
      call()
  file.unlink()
  with pytest.raises(FileNotFoundError, match='no tokenizer at'):
    shards.read_tokenizer(dataset)
  assert before


def test_what_is_not_there_is_said(tmp_path, dataset):
  with pytest.raises(FileNotFoundError, match='has no manifest.json'):
    shards.open_split(tmp_path, 'train')
  with pytest.raises(ValueError, match="no split 'test'; it has"):
    shards.open_split(dataset, 'test')
  with pytest.raises(FileNotFoundError, match='neither a file nor a folder'):
    prepare.prepare(str(tmp_path / 'none'), str(tmp_path / 'out'))
  (tmp_path / 'tokenizer.json').write_text('{}')
  with pytest.raises(ValueError, match=r'is not a tokenizer\.json'):
    tokenizer.load_tokenizer(tmp_path / 'tokenizer.json')
