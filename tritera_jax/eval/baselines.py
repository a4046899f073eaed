# SPDX-License-Identifier: Apache-2.0
"""What a language model must beat: compressors and a unigram model."""

import gzip
import lzma
from pathlib import Path

import numpy as np

from tritera_jax.data import prepare, shards
from tritera_jax.data.shards import TokenSource

_CHUNK = 2**24  # tokens read at once


def gzip_bits_per_byte(text: bytes) -> float:
  """`gzip -9`, its header included."""
  return 8 * len(gzip.compress(text, 9)) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
  """`xz -9`, its header included."""
  return 8 * len(lzma.compress(text, preset=9)) / len(text)


def unigram_bits_per_byte(train: TokenSource, held_out: TokenSource) -> float:
  """Tokens drawn by their frequency in `train`, plus one for each token."""
  counts = _counts(train) + 1
  log2_p = np.log2(counts / counts.sum())
  return float(-(_counts(held_out) * log2_p).sum() / held_out.bytes)


def all_baselines(dataset: str | Path, split: str) -> dict[str, float]:
  """Bits a byte of each baseline on a split; 'unigram' learns from 'train'."""
  text = prepare.decode_split(dataset, split)
  return {
    'gzip -9': gzip_bits_per_byte(text),
    'xz -9': xz_bits_per_byte(text),
    'unigram': unigram_bits_per_byte(
      shards.open_split(dataset, 'train'), shards.open_split(dataset, split)
    ),
  }


def _counts(source: TokenSource) -> np.ndarray:
  counts = np.zeros(source.vocab_size, np.int64)
  for start in range(0, source.tokens, _CHUNK):
    ids = source.read(start, min(start + _CHUNK, source.tokens))
    counts += np.bincount(ids, minlength=source.vocab_size)
  return counts
