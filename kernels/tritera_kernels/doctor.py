# SPDX-License-Identifier: Apache-2.0
"""Proves the kernels on the machine at hand, on bytes written by hand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tritera_kernels import formats, testing
from tritera_kernels.matmul import api

ACTIVATIONS = ('float', 'int8')


class Diagnosis(NamedTuple):
  """What came of one implementation on one kind of call.

  `verdict` is 'ok', 'refused' or 'WRONG'; `detail` says why if not 'ok'.
  """

  implementation: str
  format: str
  activations: str
  verdict: str
  detail: str


def diagnose() -> list[Diagnosis]:
  """Every implementation, format and activation precision, here and now.

  Golden bytes first, then the cases of `testing`, which pack for themselves.
  """
  found = []
  for implementation in api.IMPLEMENTATIONS:
    for format in formats.FORMATS:
      for activations in ACTIVATIONS:
        verdict, detail = _examine(implementation, format, activations)
        found.append(
          Diagnosis(implementation.name, format, activations, verdict, detail)
        )
  return found


def _examine(implementation, format, activations) -> tuple[str, str]:
  packed, codes = testing.golden(format)
  x, _, _ = testing.problem(testing.Case(3, 7, 2))
  tokens = jnp.asarray(x)
  platform = {'gpu': 'cuda'}.get(jax.default_backend(), jax.default_backend())
  refusal = implementation.reason(
    platform, (tokens, packed), {'activations': activations}
  )
  if refusal is not None:
    return 'refused', refusal
  try:
    y = api.ternary_matmul(
      tokens,
      packed,
      activations=activations,
      implementation=implementation.name,
    )
    scale = np.asarray(packed.scale)
    testing.compare(np.asarray(y), x, codes, scale, 'out', activations)
    for name in ('tails', 'in_3', 'matvec'):
      testing.check(implementation, testing.CASES[name], format, activations)
  except AssertionError as error:
    return 'WRONG', str(error)
  return 'ok', ''


def report() -> tuple[str, bool]:
  """A table of `diagnose`, and whether nothing was wrong."""
  device = jax.devices()[0]
  rows = diagnose()
  lines = [
    f'{jax.device_count()} x {device.device_kind}, jax {jax.__version__}'
  ]
  for row in rows:
    lines.append(
      f'{row.implementation:<12} {row.format:<11} {row.activations:<6} '
      f'{row.verdict} {row.detail}'.rstrip()
    )
  used = {
    activations: next(
      row.implementation
      for row in rows
      if row.activations == activations and row.verdict == 'ok'
    )
    for activations in ACTIVATIONS
    if any(r.verdict == 'ok' and r.activations == activations for r in rows)
  }
  for activations, name in used.items():
    slow = ' (slow: it unpacks at each call)' if name == 'reference' else ''
    lines.append(f'{activations} activations run on {name}{slow}')
  return '\n'.join(lines), all(row.verdict != 'WRONG' for row in rows)
