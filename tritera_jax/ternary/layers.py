# SPDX-License-Identifier: Apache-2.0
"""Linear layers with ternary, binary or float weights, one interface.

The latents are float32 [K, N]; the compute dtype is that of the input. The
straight-through estimator of Spectra 3.1: the forward pass multiplies by
scale * codes, the gradient of that product goes to the latents unchanged (no
clipping mask, nothing through the scale), and the input's gradient passes
through the quantised matrix.

Shapes: M tokens (two axes, if `zigzag.merged` leaves them so), K inputs,
N outputs, S scale blocks.
"""

import functools
from typing import Literal, Protocol, runtime_checkable

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from tritera_jax.parallel import zigzag
from tritera_jax.ternary import activations, quantize
from tritera_jax.ternary.quantize import Family, ScaleAxis


@runtime_checkable
class Exchange(Protocol):
  """How devices that share a matrix make it whole; `parallel.gather`'s."""

  def pack(self, matrix_KN: Array, /) -> Array:
    """What is sent of it, and kept for the backward pass."""
    ...

  def gather(self, packed_kn: Array, shape: tuple[int, int], /) -> Array:
    """The matrix."""
    ...

  def product(self, x_MK: Array, g_MN: Array, /) -> Array:
    """x^T g, summed over every device's tokens: its own share of it."""
    ...


def _dot(a, b, contract_a: int, contract_b: int, dtype) -> jax.Array:
  return jax.lax.dot_general(
    a,
    b,
    (((contract_a % a.ndim,), (contract_b,)), ((), ())),
    preferred_element_type=dtype,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _straight_through(
  x_MK, w_KN, quantizer, blocks, axis, exchange
) -> jax.Array:
  return _forward(x_MK, w_KN, quantizer, blocks, axis, exchange)[0]


def _forward(x_MK, w_KN, quantizer, blocks, axis, exchange):
  codes_KN, scale_S = quantizer(w_KN, blocks, axis)
  kept = codes_KN
  if exchange is not None:
    kept = exchange.pack(codes_KN)
    codes_KN = exchange.gather(kept, w_KN.shape)
  codes_KN = codes_KN.astype(x_MK.dtype)  # exact in every float dtype
  # The scale multiplies float32 sums rather than low-precision weights.
  if axis == 'out':
    scale_N = quantize.per_entry(scale_S, w_KN.shape[1])
    y_MN = _dot(x_MK, codes_KN, -1, 0, jnp.float32) * scale_N
  else:
    scale_K = quantize.per_entry(scale_S, w_KN.shape[0])
    scaled_MK = (x_MK * scale_K).astype(x_MK.dtype)
    y_MN = _dot(scaled_MK, codes_KN, -1, 0, jnp.float32)
  return y_MN.astype(x_MK.dtype), (x_MK, kept, scale_S)


def _backward(quantizer, blocks, axis, exchange, residuals, g_MN):
  del quantizer, blocks
  x_MK, codes_KN, scale_S = residuals
  if exchange is not None:
    codes_KN = exchange.gather(codes_KN, (x_MK.shape[-1], g_MN.shape[-1]))
  codes_KN = codes_KN.astype(x_MK.dtype)
  if axis == 'out':
    scale_N = quantize.per_entry(scale_S, codes_KN.shape[1])
    scaled_MN = (g_MN * scale_N).astype(g_MN.dtype)
    dx_MK = _dot(scaled_MN, codes_KN, -1, 1, jnp.float32)
  else:
    scale_K = quantize.per_entry(scale_S, codes_KN.shape[0])
    dx_MK = _dot(g_MN, codes_KN, -1, 1, jnp.float32) * scale_K
  if exchange is None:
    M = tuple(range(g_MN.ndim - 1))
    dw_KN = jax.lax.dot_general(
      x_MK, g_MN, ((M, M), ((), ())), preferred_element_type=jnp.float32
    )
  else:
    dw_KN = exchange.product(x_MK, g_MN)
  return dx_MK.astype(x_MK.dtype), dw_KN


_straight_through.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _float_matmul(x_MK, w_KN, exchange) -> jax.Array:
  return _float_forward(x_MK, w_KN, exchange)[0]


def _float_forward(x_MK, w_KN, exchange):
  # The latents stand for what is kept: they are there anyway.
  return jnp.dot(x_MK, _made_whole(x_MK, w_KN, exchange)), (x_MK, w_KN)


def _made_whole(x_MK, w_KN, exchange):
  return exchange.gather(exchange.pack(w_KN.astype(x_MK.dtype)), w_KN.shape)


def _float_backward(exchange, residuals, g_MN):
  x_MK, w_KN = residuals
  whole_KN = _made_whole(x_MK, w_KN, exchange)
  return g_MN @ whole_KN.T, exchange.product(x_MK, g_MN)


_float_matmul.defvjp(_float_forward, _float_backward)


def straight_through_matmul(
  x: Float[Array, '*batch K'],
  w_KN: Float32[Array, 'K N'],
  *,
  family: Family,
  blocks: int = 1,
  axis: ScaleAxis = 'out',
  floor: bool = False,
  exchange: Exchange | None = None,
) -> Float[Array, '*batch N']:
  """x @ (scale * codes of w), straight-through to the float32 latents w.

  Sums are float32 whatever x's dtype; the result has x's dtype. `family` is
  'ternary' or 'binary', `floor` as of `quantize.quantizer`. With an
  exchange, devices send each other codes in its way, in either pass.

  Raises:
    ValueError: the blocks do not fit the matrix (see `quantize.ternarize`).
  """
  if blocks == 1:
    axis = 'out'  # one scale: multiply the sums, whichever axis it is said of
  x_MK = zigzag.merged(x)
  y_MN: jax.Array = _straight_through(
    x_MK, w_KN, quantize.quantizer(family, floor=floor), blocks, axis, exchange
  )
  return y_MN.reshape(*x.shape[:-1], w_KN.shape[1])


class FloatLinear(nnx.Module):
  """y = x W with float32 W [K, N], no bias; FloatLM's layer, and the head's.

  Attributes:
    kernel: W.
    axes: its two logical axes.
    exchange: how devices that share W make it whole; None: as XLA does.
    norm_epsilon: of an RMSNorm without gain that x goes through; None: none.
    activation_bits: 8: x is rounded to int8, token by token; None: it is not.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    axes: tuple[str, str],
    init_std: float,
    rngs: nnx.Rngs,
  ):
    shape = (in_features, out_features)
    self.kernel = nnx.Param(
      init_std * jax.random.normal(rngs.params(), shape, jnp.float32),
      axes=axes,
    )
    self.axes = axes
    self.exchange: Exchange | None = None
    self.norm_epsilon: float | None = None
    self.activation_bits: Literal[8] | None = None

  def _taken(self, x: Float[Array, '*batch K']) -> Float[Array, '*batch K']:
    """What W multiplies."""
    if self.norm_epsilon is not None:
      x = activations.rms_normalized(x, self.norm_epsilon)
    if self.activation_bits is not None:
      x = activations.int8_straight_through(x)
    return x

  def __call__(self, x: Float[Array, '*batch K']) -> Float[Array, '*batch N']:
    x = self._taken(x)
    w_KN = self.kernel[...]
    if self.exchange is None:
      return jnp.dot(x, w_KN.astype(x.dtype))
    x_MK = zigzag.merged(x)
    y_MN: jax.Array = _float_matmul(x_MK, w_KN, self.exchange)
    return y_MN.reshape(*x.shape[:-1], w_KN.shape[1])


class QuantizedLinear(FloatLinear):
  """y = x (scale * codes): TriLM's layer ('ternary') and BiLM's ('binary').

  Invariants: `kernel` is the latent matrix, float32 [K, N]; its codes and
  scales follow from it alone and from (family, scale_blocks, scale_axis,
  scale_floor).
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    family: Family,
    scale_blocks: int,
    scale_axis: ScaleAxis,
    scale_floor: bool = False,
    axes: tuple[str, str],
    init_std: float,
    rngs: nnx.Rngs,
  ):
    super().__init__(
      in_features, out_features, axes=axes, init_std=init_std, rngs=rngs
    )
    quantize.check_blocks((in_features, out_features), scale_blocks, scale_axis)
    self.family: Family = family
    self.scale_blocks = scale_blocks
    self.scale_axis: ScaleAxis = scale_axis
    self.scale_floor = scale_floor

  def __call__(self, x: Float[Array, '*batch K']) -> Float[Array, '*batch N']:
    return straight_through_matmul(
      self._taken(x),
      self.kernel[...],
      family=self.family,
      blocks=self.scale_blocks,
      axis=self.scale_axis,
      floor=self.scale_floor,
      exchange=self.exchange,
    )
