# SPDX-License-Identifier: Apache-2.0
"""How a training process ends, so that a scheduler knows what to do.

  0        done
  1, 2     refused, or misused
  74       a checkpoint or record could not be written: make room first
  75       stalled, a peer was lost, or there was no time left to save
  128 + n  stopped by signal n (143 SIGTERM, 130 Ctrl-C) and saved
  other    killed or aborted, as JAX does when it loses the coordinator

After any above 2 the same command goes on; after 1 and 2 it would end again.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import re
import sys
import traceback

import jax

from tritera_jax.checkpoint.save import NotSavedError
from tritera_jax.train.signals import Stopped
from tritera_jax.train.watchdog import EXIT_AGAIN

EXIT_NOT_SAVED = 74  # EX_IOERR of sysexits.h
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Of JAX, where another process or the way to it has gone.
_LOST = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|[Gg]loo|NCCL|[Hh]eartbeat'
)


@contextlib.contextmanager
def told(processes: int) -> Iterator[None]:
  """Says what ended the block and exits with its code.

  Of several processes one that fails leaves at once: at its exit JAX would
  wait for the others, which wait for it in a collective.
  """
  try:
    yield
    return
  except Stopped as stopped:  # all of them, together
    print(f'tritera train: {stopped}', file=sys.stderr)
    raise SystemExit(128 + stopped.number) from None
  except NotSavedError as error:
    code, words = EXIT_NOT_SAVED, str(error)
  except Exception as error:
    code, words = 1, str(error)
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
      code = EXIT_NOT_SAVED
    elif processes == 1:
      raise
    if not isinstance(error, ValueError | OSError | FloatingPointError):
      words = traceback.format_exc()
    if isinstance(error, jax.errors.JaxRuntimeError) and _LOST.search(
      str(error)
    ):
      code, words = EXIT_AGAIN, f'a peer was lost, it seems: {error}'
  print(f'tritera train: {words}', file=sys.stderr, flush=True)
  if processes > 1:
    os._exit(code)
  raise SystemExit(code)
