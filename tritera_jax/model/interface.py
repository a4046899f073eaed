# SPDX-License-Identifier: Apache-2.0
"""What generation and evaluation ask of a model."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Float32, Int32

from tritera_jax.model.config import ModelConfig


@runtime_checkable
class LanguageModel(Protocol):
  """A pytree of weights, to be given to jit as an argument.

  `hidden` is the residual stream past the last block, and `logits` what the
  norm and head make of it: whoever wants the last position's logits alone
  need not compute the others'. Calling the model does both.
  """

  @property
  def config(self) -> ModelConfig: ...

  def empty_cache(self, rows: int, slots: int) -> Any: ...

  def hidden(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: Any = None,
  ) -> tuple[Float[Array, 'B T D'], Any]: ...

  def logits(
    self, x_BTD: Float[Array, '*batch D']
  ) -> Float32[Array, '*batch V']: ...

  def __call__(
    self,
    tokens_BT: Int32[Array, 'B T'],
    positions_BT: Int32[Array, 'B T'] | None = None,
    cache: Any = None,
  ) -> tuple[Float32[Array, 'B T V'], Any]: ...
