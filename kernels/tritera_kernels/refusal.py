# SPDX-License-Identifier: Apache-2.0
"""An error that waits for the platform.

A program does not know where it will run until it is lowered, so a refusal
for one platform cannot be raised while tracing: `refuse` is the identity, and
raises on the platforms whose branch holds it.
"""

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir


class Refused(ValueError):
  """No implementation that may serve a call can: every reason is given."""


_refuse_p = core.Primitive('refuse')


def refuse(x: jax.Array, message: str) -> jax.Array:
  """x where it is never lowered or run.

  Raises:
    Refused: the message; when run eagerly, or when lowered.
  """
  return _refuse_p.bind(x, message=message)


def _raise(*operands, message: str):
  del operands
  raise Refused(message)


def _batch(operands, axes, *, message: str):
  return refuse(operands[0], message), axes[0]


_refuse_p.def_impl(_raise)
_refuse_p.def_abstract_eval(lambda x, **_: x)
mlir.register_lowering(_refuse_p, _raise)
batching.primitive_batchers[_refuse_p] = _batch
# Linear, so that a gradient can be traced through a branch that refuses.
ad.deflinear2(_refuse_p, lambda ct, x, **_: [ct])
