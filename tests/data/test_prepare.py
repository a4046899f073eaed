# SPDX-License-Identifier: Apache-2.0
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import tokenizers

from tritera_jax.data import prepare, shards, tokenizer

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
    tokens = raw(dataset, f'{split}/00000.tokens.zarr3')
    ends = raw(dataset, f'{split}/00000.ends.zarr3')
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


def test_the_held_out_files_stay_when_others_come(dataset, corpus, tmp_path):
  before = prepare.decode_split(dataset, 'validation')
  assert before
  (corpus / 'later_a.py').write_text('a = 1\n')
  names = [p.relative_to(corpus).as_posix() for p in corpus.rglob('*.py')]
  held = {n for n in names if prepare._held_out(n, 0.3)}
  assert {Path(n).name for n in held} - {'later_a.py'} == {
    name for name, text in TEXTS.items() if text.encode() in before
  }


def test_again_it_finds_what_is_there_and_other_arguments_are_refused(
  corpus, dataset
):
  before = (dataset / 'manifest.json').stat().st_mtime_ns
  prepare.prepare(str(corpus), str(dataset), vocab_size=300, holdout=0.3)
  assert (dataset / 'manifest.json').stat().st_mtime_ns == before
  with pytest.raises(ValueError, match="holds a dataset.*'vocab_size': 300"):
    prepare.prepare(str(corpus), str(dataset), vocab_size=301, holdout=0.3)


def test_a_given_tokenizer_is_used_as_it_is(corpus, dataset, tmp_path):
  other = tmp_path / 'again'
  prepare.prepare(
    str(corpus), str(other), holdout=0.3,
    tokenizer=str(dataset / 'tokenizer.json'),
  )  # fmt: skip
  for split in ('train', 'validation'):
    path = f'{split}/00000.tokens.zarr3'
    np.testing.assert_array_equal(raw(other, path), raw(dataset, path))


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


def test_the_standard_library_is_found_without_its_tests():
  root, files = prepare._stdlib_files()
  assert (root / 'json' / 'decoder.py').is_file()
  assert Path('json/decoder.py') in files and len(files) > 400
  assert not [f for f in files if 'test' in f.parts or 'tests' in f.parts]
  assert not [f for f in files if 'site-packages' in f.parts]


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
    ({'extra': 1}, 'extra: Unexpected keyword argument'),
    ({'tokens': 7}, r'the manifest says uint16\[7\]'),
    ({'path': '../train/00000'}, 'leaves the dataset'),
    ({'path': 'train/00001'}, 'cannot be opened'),
  ],
)
def test_a_manifest_that_lies_is_refused(dataset, changes, message):
  broken(dataset, **changes)
  with pytest.raises(ValueError, match=message):
    shards.open_split(dataset, 'train')


def test_tokens_that_are_not_the_manifests_are_found(dataset):
  shards.open_split(dataset, 'train').verify()
  broken(dataset, vocab_size=200)
  with pytest.raises(ValueError, match='past the vocabulary of 200'):
    shards.open_split(dataset, 'train').verify()
  broken(dataset, vocab_size=300, sha256='0' * 64)
  with pytest.raises(ValueError, match='does not match its digest'):
    shards.open_split(dataset, 'train').verify()


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
