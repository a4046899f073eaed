# SPDX-License-Identifier: Apache-2.0
"""`ternary_matmul`, and the only place that chooses who computes it.

To add a kernel: write a module with an `Implementation`, put it into
IMPLEMENTATIONS before those it should beat, and run `testing.check` on every
case from its test.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from tritera_kernels import packed as packed_lib
from tritera_kernels.matmul import reference, refusal
from tritera_kernels.matmul.implementation import Implementation, Platform
from tritera_kernels.packed import PackedTernary

IMPLEMENTATIONS: tuple[Implementation, ...] = (reference.REFERENCE,)
PLATFORMS: tuple[Platform, ...] = ('cpu', 'cuda', 'rocm', 'tpu')


class Plan(NamedTuple):
  """Who computes a call on one platform, and why the others do not."""

  chosen: Implementation
  refusals: dict[str, str]


def plan(
  x: Float[Array, '*batch K'],
  packed: PackedTernary,
  activations: str,
  platform: str,
  implementation: str | None = None,
) -> Plan:
  """The first implementation that does not refuse; the named one if named.

  Raises:
    ValueError: the name is unknown.
    Refused: (a ValueError) that implementation refuses: its reason is given,
      and every other's.
  """
  names = [candidate.name for candidate in IMPLEMENTATIONS]
  if implementation is not None and implementation not in names:
    raise ValueError(
      f'implementation={implementation!r} is unknown; known: {names}'
    )
  refusals = {}
  for candidate in IMPLEMENTATIONS:
    reason = candidate.reason(x, packed, activations, platform)
    if reason is not None:
      refusals[candidate.name] = reason
    elif implementation in (None, candidate.name):
      return Plan(candidate, refusals)
  listed = '; '.join(f'{name}: {why}' for name, why in refusals.items())
  raise refusal.Refused(
    f'implementation={implementation!r} refuses this call on {platform} '
    f'({listed})'
  )


def ternary_matmul(
  x: Shaped[Array, '*batch K'],
  packed: PackedTernary,
  *,
  activations: str,
  implementation: str | None = None,
) -> Float[Array, '*batch N']:
  """x (scale * codes)^T for packed codes [N, K]: see `reference.run`.

  The platform is the one the program is lowered for: a named implementation
  that refuses it raises then, at lowering. Differentiable in x for float
  activations where the implementation is; int8 rounds, so its gradient is
  zero or undefined.

  Args:
    x: float32, bfloat16 or float16.
    packed: the matrix.
    activations: 'float', or 'int8' with one scale a token. Belongs to the
      caller and the packed model, never to which kernel is at hand.
    implementation: a name in IMPLEMENTATIONS; default: the first that can.

  Returns:
    In x's dtype.

  Raises:
    TypeError: x is of another dtype.
    ValueError: K differs, unknown activations or implementation, a layout
      that `packed.check_layout` refuses, or the named implementation refuses.
  """
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise TypeError(f'x is {x.dtype}; cast it to float32, bfloat16 or float16')
  if activations not in ('float', 'int8'):
    raise ValueError(f"activations={activations!r} must be 'float' or 'int8'")
  N, K = packed.shape
  if x.shape[-1:] != (K,):
    raise ValueError(
      f'x has shape {x.shape}; its last axis must be the K={K} inputs of the '
      'packed matrix'
    )
  packed_lib.check_layout(packed)
  x_MK = x.reshape(-1, K)
  runs = _runs(x_MK, packed, activations, implementation)
  if len(set(runs.values())) == 1:
    y_MN = next(iter(runs.values()))(x_MK, packed)
  else:
    y_MN = jax.lax.platform_dependent(x_MK, packed, **runs)
  return y_MN.reshape(*x.shape[:-1], N)


def _runs(
  x_MK, packed: PackedTernary, activations: str, implementation: str | None
) -> dict[Platform, Callable]:
  """What each platform runs; equal functions where the choice is the same."""

  @functools.cache
  def run(choice: Implementation):
    return lambda x_MK, packed: choice.run(x_MK, packed, activations)

  runs, refused = {}, {}
  for platform in PLATFORMS:
    try:
      choice = plan(x_MK, packed, activations, platform, implementation).chosen
      runs[platform] = run(choice)
    except refusal.Refused as error:
      refused[platform] = str(error)
  if not runs:
    raise refusal.Refused('\n'.join(refused.values()))
  for platform, message in refused.items():
    runs[platform] = functools.partial(_refused, message, activations)
  return runs


def _refused(message: str, activations: str, x_MK, packed: PackedTernary):
  """Has the shape, dtype and derivatives of a result, and raises."""
  return reference.run(refusal.refuse(x_MK, message), packed, activations)
