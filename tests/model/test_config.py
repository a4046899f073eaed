# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from tests.model.test_decoder import TINY


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'kv_heads': 3}, 'model.kv_heads=3 must divide model.heads=4'),
    ({'head_dim': 5}, 'model.head_dim=5 must be even'),
    ({'layers': 0}, 'model.layers=0 must be >= 1'),
    ({'scale_blocks': 5}, 'attention.q: scale_blocks=5 does not divide'),
  ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
  # Spectra A.1 and the third-party packers' figures: facts 2.1.
  ('blocks', 'rows'),
  [(1, 50_304), (2, 50_432), (3, 50_304), (6, 50_688)],
)
def test_the_vocabulary_is_padded_to_128_a_block(blocks, rows):
  config = dataclasses.replace(TINY, vocab_size=50_277, scale_blocks=blocks)
  assert config.padded_vocab_size == rows


def test_an_imported_vocabulary_needs_no_padding():
  config = dataclasses.replace(
    TINY, vocab_size=32_002, scale_blocks=2, vocab_multiple=1
  )
  assert config.padded_vocab_size == 32_002
