# SPDX-License-Identifier: Apache-2.0
"""Text to a tokenizer and token shards.

The bytes that come out depend on the corpus and the arguments alone: not on
interruptions, and not on how many hosts share the work (see `units`).
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from pathlib import Path
import re
import time

import tokenizers

from tritera_jax.data import documents, shards, storage, units
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.data.documents import File
from tritera_jax.data.shards import Shard
from tritera_jax.data.units import SPLITS, Encoder, Unit

_TOKENIZER_BYTES = 2**27  # of text, that a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class Summary:
  """What a dataset holds; printed by the command line.

  Attributes:
    folder: of the dataset.
    manifest: its manifest; None while other hosts have work to do.
    seconds: this call took: next to none if the dataset was there.
  """

  folder: str
  manifest: shards.Manifest | None
  seconds: float

  def __str__(self) -> str:
    if self.manifest is None:
      return (
        f'{self.folder}: the share of this host is done, '
        f'{self.seconds:.1f} s; the last host to finish writes the manifest'
      )
    lines = [f'{self.folder}: {self.manifest.vocab_size:,} tokens in the '
             f'vocabulary, {self.seconds:.1f} s']  # fmt: skip
    for split, entries in self.manifest.splits.items():
      ends, text, tokens = (
        sum(getattr(shard, field) for shard in entries)
        for field in ('documents', 'bytes', 'tokens')
      )
      lines.append(
        f'  {split:<10} {ends:,} documents, {text:,} bytes, '
        f'{tokens:,} tokens ({text / max(tokens, 1):.2f} bytes a token)'
      )
    if self.manifest.left_out:
      lines.append(
        f'  left out   {self.manifest.left_out:,} documents that are empty or '
        'not text'
      )
    return '\n'.join(lines)


def prepare(
  corpus: str,
  out: str,
  *,
  vocab_size: int = 4096,
  pieces: tokenizer_lib.Pieces = 'code',
  tokenizer: str | None = None,
  holdout: float = 0.05,
  text_field: str = 'text',
  shard_tokens: int = 2**26,
  host: int = 0,
  hosts: int = 1,
  progress: Callable[[int, int], None] | None = None,
) -> Summary:
  """Writes a dataset: token shards of a train and a validation split.

  Interrupted, it goes on where it was when run again; finished, it returns
  what is there. All cores encode. Several hosts that see the same corpus and
  the same `out` share the work, each with its own `host`.

  Args:
    corpus: a file, a folder, or 'stdlib': the source text of the Python
      standard library. A .jsonl(.gz, .zst) file is a document a line, a
      .parquet file one a row, any other file one document.
    out: dataset folder to write, or a bucket URL (gs://..., s3://...).
    vocab_size: most tokens of the tokenizer that is trained, on up to 128 MiB
      of the train split.
    pieces: that the tokenizer never crosses: 'code', 'gpt-2' or 'llama-3'. With
      the last two, llama.cpp reads what is exported to it.
    tokenizer: a Hugging Face tokenizer.json to use instead of training one.
    holdout: share of documents in the validation split, chosen by a hash of
      their names; 0 for no such split.
    text_field: where a line's object or a row has its text.
    shard_tokens: tokens of a shard, about: it ends with the part of a document
      that fills it. Each split has as many in memory.
    host: which one this is, from 0.
    hosts: how many share the work.
    progress: called with the bytes of files done, and those of this host, once
      there is a tokenizer.

  Raises:
    FileNotFoundError: there is no such corpus or tokenizer.
    ValueError: a damaged file, no text in a split, or `out` holds another
      dataset; or .zst and .parquet files without the extra [data].
  """
  started = time.perf_counter()
  if not 0 <= host < hosts:
    raise ValueError(f'host={host} must lie in 0..hosts-1={hosts - 1}')
  if not 0 <= holdout < 1:
    raise ValueError(f'holdout={holdout} must lie in [0, 1)')
  if shard_tokens < 1:
    raise ValueError(f'shard_tokens={shard_tokens} must be >= 1')
  if tokenizer is not None and pieces != 'code':
    raise ValueError(
      f'pieces={pieces!r} is for a tokenizer that is trained; {tokenizer} has '
      'its own'
    )
  listing = documents.files(corpus)
  recipe = {
    'corpus': corpus,
    'files': documents.digest(listing),
    'holdout': float(holdout),  # 0 and 0.0 are one
    'text_field': text_field,
    'shard_tokens': shard_tokens,
  }
  if tokenizer is None:
    recipe['vocab_size'] = vocab_size
    if pieces != 'code':  # there was no choice once
      recipe['pieces'] = pieces
  else:
    given = tokenizer_lib.load_tokenizer(tokenizer)
    folder = str(tokenizer).rpartition('/')[0] or '.'
    end = tokenizer_lib.end_of_text_id(given, folder)
    recipe['tokenizer'] = tokenizer_lib.fingerprint(given)
  if storage.read(out, 'manifest.json') is not None:
    manifest = shards.read_manifest(out)
    _check_recipe(out, manifest.recipe, recipe)
    storage.delete(out, 'progress/')  # a call that was killed just here
    return Summary(out, manifest, time.perf_counter() - started)

  if tokenizer is None:
    given = _trained(out, recipe, listing)
    end = tokenizer_lib.end_of_text_id(given)
  else:
    storage.write(out, 'tokenizer.json', given.to_str(pretty=True).encode())
    tokenizer_lib.record_end(out, given, end)
  encoder = Encoder(given, end)
  work = [
    Unit(out, number, files, recipe | {'tokenizer': encoder.fingerprint})
    for number, files in enumerate(units.group(listing))
  ]
  mine = work[host::hosts]
  total = sum(unit.size for unit in mine)
  done = 0
  for unit in mine:
    unit.run(encoder, _offset(progress, done, total))
    done += unit.size
  return Summary(
    out,
    _finish(out, work, encoder, recipe),
    time.perf_counter() - started,
  )


def _offset(
  progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int], None]:
  return lambda done: progress(before + done, total) if progress else None


def _check_recipe(out: str, old: dict, new: dict):
  differing = [
    f'{name}: {old.get(name)!r} there, {new.get(name)!r} here'
    for name in sorted({*old, *new} - {'corpus'})
    if old.get(name) != new.get(name)
  ]
  if differing:
    raise ValueError(
      f'{out} holds another dataset ({"; ".join(differing)}); choose another '
      'folder, or delete this one'
    )


def _trained(
  out: str, recipe: dict, listing: list[File]
) -> tokenizers.Tokenizer:
  """The tokenizer of an interrupted call, or one trained now."""
  key = units.key(recipe)
  if storage.read(out, 'progress/tokenizer') == key:
    return tokenizer_lib.load_tokenizer(f'{out}/tokenizer.json')
  trained = tokenizer_lib.train_tokenizer(
    _training_texts(listing, recipe),
    recipe['vocab_size'],
    recipe.get('pieces', 'code'),
  )
  storage.write(out, 'tokenizer.json', trained.to_str(pretty=True).encode())
  storage.write(out, 'progress/tokenizer', key)
  return trained


def _training_texts(listing: list[File], recipe: dict) -> Iterator[str]:
  """Text of the train split: all, or that of files chosen by a hash."""
  chosen, size = [], 0
  for file in sorted(listing, key=lambda file: units.hashed(file.name)):
    if size < _TOKENIZER_BYTES:
      chosen.append(file)
      size += file.size
  left = _TOKENIZER_BYTES
  for file in sorted(chosen):
    # The same share of each file, so that none crowds out the others.
    share = math.ceil(left * file.size / size) if size else 0
    size -= file.size
    for part in documents.read(file, recipe['text_field']):
      if share <= 0:
        break
      if not units.held_out(part.document, recipe['holdout']):
        yield part.text
        share -= len(part.text)
        left -= len(part.text)


def _finish(
  out: str, work: list[Unit], encoder: Encoder, recipe: dict
) -> shards.Manifest | None:
  """Writes the manifest if every unit of every host is done."""
  for unit in work:
    unit.read()
  if not all(unit.record['done'] for unit in work):
    # Or another host has just finished, and tidied up.
    there = storage.read(out, 'manifest.json') is not None
    return shards.read_manifest(out) if there else None
  splits = {
    split: [Shard(**s) for unit in work for s in unit.record['shards'][split]]
    for split in SPLITS
    if recipe['holdout'] or split == 'train'
  }
  for split, entries in splits.items():
    if not entries:
      raise ValueError(
        f'corpus {recipe["corpus"]}: no text in the {split} split of '
        f'{sum(len(unit.files) for unit in work)} files; change '
        f'holdout={recipe["holdout"]} (0 for no validation split), or give '
        'more documents'
      )
  manifest = shards.Manifest(
    tokenizer=encoder.fingerprint,
    vocab_size=encoder.vocab_size,
    end_of_text=encoder.end_of_text,
    dtype=encoder.dtype,
    splits=splits,
    recipe=recipe,
    left_out=sum(unit.record['left_out'] for unit in work),
  )
  _delete_leftovers(out, splits)
  shards.write_manifest(out, manifest)
  storage.delete(out, 'progress/')
  return manifest


def _delete_leftovers(out: str, splits: dict[str, list[Shard]]):
  """Deletes what interrupted calls with another corpus or recipe wrote."""
  kept = {shard.path for entries in splits.values() for shard in entries}
  found = set()
  for split in SPLITS:
    array = re.compile(rf'({split}/\d{{5,}}-\d{{3,}})\.(tokens|ends)\.zarr3/')
    matches = map(array.match, storage.names(out, f'{split}/'))
    found |= {match[0] for match in matches if match and match[1] not in kept}
  for folder in sorted(found):
    storage.delete(out, folder)


def decode_split(dataset: str | Path, split: str) -> bytes:
  """The text of a split, documents end to end: what byte counts refer to.

  Raises:
    FileNotFoundError: not a finished dataset.
    ValueError: no such split, or the dataset is damaged.
  """
  source = shards.open_split(dataset, split)
  tokenizer = shards.read_tokenizer(dataset)
  ids = source.read(0, source.tokens)
  return tokenizer.decode(
    ids[ids != source.manifest.end_of_text].tolist(),
    skip_special_tokens=False,
  ).encode()
