# SPDX-License-Identifier: Apache-2.0
"""Golden files in the llama.cpp that is installed, if one is."""

import numpy as np
import pytest

from tests.drills import llama_cpp_reads
from tests.interop import gguf_golden
from tritera_jax.data import tokenizer as tokenizer_lib
from tritera_jax.interop.gguf import tokenizer_keys

pytest.importorskip(
  'llama_cpp',
  reason="runs where llama.cpp is installed: pip install 'tritera_jax[peers]'",
)


@pytest.mark.parametrize('name', gguf_golden.GOLDEN)
def test_llama_cpp_computes_what_it_did(name):
  file = gguf_golden.FOLDER / f'{name}.gguf'
  logits, model = llama_cpp_reads.theirs(file, 64)
  found, wanted = logits(gguf_golden.ids()), np.load(file.with_suffix('.npy'))
  # Other instruction sets sum in another order, before an int8 rounding.
  assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
  tokenizer = tokenizer_lib.train_tokenizer(
    [gguf_golden.TEXT], gguf_golden.VOCABULARY, 'llama-3'
  )
  assert tokenizer_keys.exact_rule(tokenizer) == 'llama-bpe'
  for text in (gguf_golden.TEXT, llama_cpp_reads.TEXT):
    ids = model.tokenize(text.encode(), add_bos=False, special=False)
    assert ids == tokenizer.encode(text).ids
