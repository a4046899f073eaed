# SPDX-License-Identifier: Apache-2.0
"""What the dispatch knows of a kernel."""

from collections.abc import Callable
import dataclasses
from typing import Literal

import jax

from tritera_kernels.packed import PackedTernary

Activations = Literal['float', 'int8']
Platform = Literal['cpu', 'cuda', 'rocm', 'tpu']


# Why an implementation cannot serve (x, packed, activations); None if it can.
# Decided while tracing, from shapes, dtypes and static fields alone.
type Refuses = Callable[[jax.Array, PackedTernary, str], str | None]


def never(x, packed, activations) -> None:
  """Refuses nothing."""
  del x, packed, activations


@dataclasses.dataclass(frozen=True)
class Implementation:
  """A way to compute `ternary_matmul`.

  Attributes:
    name: what a caller may ask for.
    run: (x [M, K], packed, activations) to y [M, N] in x's dtype.
    platforms: that it runs on; empty for every one.
    formats: that it reads; empty for every one.
    refuses: for what else it cannot do.
  """

  name: str
  run: Callable[[jax.Array, PackedTernary, str], jax.Array]
  platforms: tuple[Platform, ...] = ()
  formats: tuple[str, ...] = ()
  refuses: Refuses = never

  def reason(
    self,
    x: jax.Array,
    packed: PackedTernary,
    activations: str,
    platform: str,
  ) -> str | None:
    """Why it cannot serve this call on this platform; None if it can."""
    if self.platforms and platform not in self.platforms:
      return f'runs on {", ".join(self.platforms)}, not on {platform}'
    if self.formats and packed.format not in self.formats:
      return f'reads {", ".join(self.formats)}, not {packed.format}'
    return self.refuses(x, packed, activations)
