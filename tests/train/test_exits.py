# SPDX-License-Identifier: Apache-2.0
import errno
import os
import signal

import jax
import pytest

from tritera_jax.checkpoint.save import NotSavedError
from tritera_jax.train import exits
from tritera_jax.train.signals import Stopped


class Left(BaseException):
  pass


@pytest.mark.parametrize(
  'error, alone, among',
  [
    (Stopped(signal.SIGTERM, 'x'), 143, 143),
    (NotSavedError('x'), 74, 74),
    (OSError(errno.ENOSPC, 'no space left'), 74, 74),
    (FileNotFoundError('x'), None, 1),
    (jax.errors.JaxRuntimeError('UNKNOWN: Gloo: closed by peer'), None, 75),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: memory'), None, 1),
    # The command line has words for these; alone, they reach it.
    (ValueError('x'), None, 1),
    (FloatingPointError('x'), None, 1),
    (KeyError('x'), None, 1),
  ],
)
def test_codes(error, alone, among, monkeypatch, capsys):
  left = []

  def leave(code):
    left.append(code)
    raise Left

  monkeypatch.setattr(os, '_exit', leave)
  with pytest.raises((SystemExit, type(error))) as found, exits.told(1):
    raise error
  assert getattr(found.value, 'code', None) == alone
  # Among others none but one that was told to stop waits at its exit.
  with pytest.raises((SystemExit, Left)) as found, exits.told(2):
    raise error
  assert [getattr(found.value, 'code', None), *left][-1] == among
  assert bool(left) == (among != 143)
  assert 'tritera train: ' in capsys.readouterr().err
  with exits.told(2):
    pass
