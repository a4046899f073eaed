# SPDX-License-Identifier: Apache-2.0
"""Laws of the loss: frozen constants that are called with N, D and bits.

  PowerLaw       L(N)       = E + A / N^alpha              (Spectra, eq. 1)
  ChinchillaLaw  L(N, D)    = E + A / N^alpha + B / D^beta (2203.15556, 3.3)
  BitsLaw        L(N, D, b) = the same of N (1 - exp(-b / gamma)) parameters

Losses are nats a token. N counts parameters and D tokens in ones, never in
millions or billions: `of_units` converts constants that a paper gives so, and
`constants` gives them back. `counted` says which parameters N counts.

The third is the effective parameter count of Kumar et al. (2411.04330) for
weights alone. Frantar et al. (2502.16440) find that pretraining with
compressed weights acts as a multiplier of N, one free number a format; with
two families that is the same law, with more this one has fewer constants and
says something of bits that nobody has trained with.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Numbers = int | float | Sequence[int | float] | np.number | np.ndarray
Losses = float | NDArray[np.float64]
Counted = Literal['all', 'without_embeddings']
MILLION, BILLION = 1e6, 1e9

# Bits that a weight of a layer carries, by family (log2 3 = 1.585).
BITS = {'ternary': math.log2(3), 'binary': 1.0, 'float': 16.0}


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """E + A / N^alpha.

  Attributes:
    E: nats a token that no size removes.
    A: nats a token of one parameter.
    alpha: exponent of parameters.
    counted: the parameters that are N.
  """

  E: float
  A: float
  alpha: float
  counted: Counted

  def __post_init__(self):
    _finite(self)

  def __call__(self, parameters: Numbers) -> Losses:
    """Nats a token at so many parameters."""
    return self.E + self.A * np.asarray(parameters, float) ** -self.alpha

  @classmethod
  def of_units(
    cls, *, parameters: float, E: float, A: float, alpha: float,
    counted: Counted,
  ) -> 'PowerLaw':  # fmt: skip
    """From constants for N in units of so many parameters."""
    return cls(E, A * parameters**alpha, alpha, counted)

  def constants(self, parameters: float, tokens: float) -> dict[str, float]:
    """By name, for N and D in units of so many."""
    del tokens
    return {
      'E': self.E, 'A': self.A / parameters**self.alpha, 'alpha': self.alpha,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ChinchillaLaw:
  """E + A / N^alpha + B / D^beta.

  Attributes:
    E: nats a token that neither size nor data removes.
    A: nats a token of one parameter.
    alpha: exponent of parameters.
    B: nats a token of one token.
    beta: exponent of tokens.
    counted: the parameters that are N.
  """

  E: float
  A: float
  alpha: float
  B: float
  beta: float
  counted: Counted

  def __post_init__(self):
    _finite(self)

  def __call__(self, parameters: Numbers, tokens: Numbers) -> Losses:
    """Nats a token of so many parameters after so many tokens."""
    sizes, data = self.terms(parameters, tokens)
    return self.E + sizes + data

  def terms(
    self, parameters: Numbers, tokens: Numbers
  ) -> tuple[Losses, Losses]:
    """Nats that parameters leave, and that tokens leave."""
    return (
      self.A * np.asarray(parameters, float) ** -self.alpha,
      self.B * np.asarray(tokens, float) ** -self.beta,
    )

  @classmethod
  def of_units(
    cls, *, parameters: float, tokens: float, E: float, A: float,
    alpha: float, B: float, beta: float, counted: Counted,
  ) -> 'ChinchillaLaw':  # fmt: skip
    """From constants for N and D in units of so many."""
    return cls(E, A * parameters**alpha, alpha, B * tokens**beta, beta, counted)

  def constants(self, parameters: float, tokens: float) -> dict[str, float]:
    """By name, for N and D in units of so many."""
    return {
      'E': self.E,
      'A': self.A / parameters**self.alpha,
      'alpha': self.alpha,
      'B': self.B / tokens**self.beta,
      'beta': self.beta,
    }


@dataclasses.dataclass(frozen=True)
class BitsLaw:
  """E + A / (N (1 - exp(-b / gamma)))^alpha + B / D^beta.

  Attributes:
    float_law: of weights with bits without end.
    gamma: bits a weight at which 1 - 1/e of the parameters count.
  """

  float_law: ChinchillaLaw
  gamma: float

  def __post_init__(self):
    _finite(self)

  def __call__(
    self, parameters: Numbers, tokens: Numbers, bits_per_weight: Numbers
  ) -> Losses:
    """Nats a token, each weight of a layer carrying so many bits."""
    effective = np.asarray(parameters, float) * self.capacity(bits_per_weight)
    return self.float_law(effective, tokens)

  def capacity(self, bits_per_weight: Numbers) -> Losses:
    """Parameters without quantisation that one with so many bits is worth."""
    return -np.expm1(-np.asarray(bits_per_weight, float) / self.gamma)

  def at(self, bits_per_weight: float) -> ChinchillaLaw:
    """The law of one kind of weights."""
    law = self.float_law
    worth = float(self.capacity(bits_per_weight)) ** -law.alpha
    return dataclasses.replace(law, A=law.A * worth)

  def constants(self, parameters: float, tokens: float) -> dict[str, float]:
    """By name, for N and D in units of so many."""
    return {
      **self.float_law.constants(parameters, tokens), 'gamma': self.gamma,
    }  # fmt: skip


Law = PowerLaw | ChinchillaLaw | BitsLaw


def _finite(law: Law):
  for field in dataclasses.fields(law):
    value = getattr(law, field.name)
    if isinstance(value, float | int) and not math.isfinite(value):
      raise ValueError(f'{field.name}={value} of a law must be a number')


# Spectra (2407.12327 v5, eq. 1): nine sizes at 300e9 tokens.
TRILM_SPECTRA_1 = PowerLaw(E=1.76, A=185.0, alpha=0.26, counted='all')
FLOATLM_SPECTRA_1 = PowerLaw(E=1.67, A=159.0, alpha=0.26, counted='all')

# Spectra 1.1 (2506.23025), by readers of it: N in millions without embeddings,
# D in billions; 20 TriLMs of 99M to 1.1B on 20e9 to 150e9 tokens.
TRILM_SPECTRA_1_1 = ChinchillaLaw.of_units(
  parameters=MILLION, tokens=BILLION, E=2.19, A=4.73, alpha=0.32, B=5.18,
  beta=0.81, counted='without_embeddings',
)  # fmt: skip
FLOATLM_SPECTRA_1_1 = ChinchillaLaw.of_units(
  parameters=MILLION, tokens=BILLION, E=2.17, A=7.86, alpha=0.56, B=3.42,
  beta=0.53, counted='without_embeddings',
)  # fmt: skip
