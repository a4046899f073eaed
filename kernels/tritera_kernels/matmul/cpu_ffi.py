# SPDX-License-Identifier: Apache-2.0
"""`ternary_matmul` by the C++ kernels, as an XLA FFI custom call.

Under `jax.vmap` a batch of x, or of matrices, stays one call. Under sharding
XLA gathers what a custom call reads: use `jax.shard_map`, a shard a call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tritera_kernels.cpu import library
from tritera_kernels.matmul import reference
from tritera_kernels.matmul.implementation import Implementation
from tritera_kernels.packed import PackedTernary

# As enum Format of cpu/kernel.h.
FORMATS = {'two_bit': 0, 'base_three': 1, 'byte': 2}
MOST_INPUTS = 2**22


def _refuses(x, packed: PackedTernary, activations: str) -> str | None:
  if packed.shape[1] > MOST_INPUTS:
    return f'K={packed.shape[1]} exceeds {MOST_INPUTS}'
  return library.why_missing()


def run(
  x_MK: jax.Array, packed: PackedTernary, activations: str
) -> jax.Array:
  """See `reference.run`: equal to it for int8, within 4 eps for float."""
  if activations == 'int8':
    return _call(x_MK, packed, 'int8')
  return _float(x_MK, packed)


def _call(x_MK, packed: PackedTernary, activations: str):
  library.load()
  y_MN = jax.ffi.ffi_call(
    'tritera_matmul',
    jax.ShapeDtypeStruct((x_MK.shape[0], packed.shape[0]), jnp.float32),
    vmap_method='expand_dims',
  )(
    x_MK.astype(jnp.float32),
    packed.data,
    packed.scale,
    format=np.int64(FORMATS[packed.format]),
    along_inputs=packed.scale_axis == 'in',
    int8=activations == 'int8',
  )
  return y_MN.astype(x_MK.dtype)


@jax.custom_vjp
def _float(x_MK, packed: PackedTernary):
  return _call(x_MK, packed, 'float')


def _backward(residuals, dy_MN):
  x_MK, packed = residuals
  _, pull = jax.vjp(lambda x: reference.run(x, packed, 'float'), x_MK)
  return (*pull(dy_MN), None)


_float.defvjp(lambda x, packed: (_call(x, packed, 'float'), (x, packed)), _backward)

CPU_FFI = Implementation(
  'cpu_ffi',
  run,
  platforms=('cpu',),
  formats=('two_bit', 'base_three'),
  refuses=_refuses,
)
