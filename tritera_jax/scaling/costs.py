# SPDX-License-Identifier: Apache-2.0
"""What N parameters cost to train and to serve, by family."""

from collections.abc import Callable, Iterable
import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from tritera_jax.scaling.laws import Counted, Numbers
from tritera_jax.scaling.runs import Run

Array = NDArray[np.float64]
Amount = float | Array

# Sizes without embeddings that costs are tabulated at, and interpolated in
# logarithms between: to 1e-5, from one parameter to 1e18.
_BODY = np.geomspace(1.0, 1e18, 3601)


@dataclasses.dataclass(frozen=True)
class Growth:
  """coefficient * size^exponent, for what grows with a model.

  Attributes:
    coefficient: 0 where there is none of it.
    exponent: of the size.
    worst: the largest relative difference from what it was fitted to.
  """

  coefficient: float
  exponent: float
  worst: float = 0.0

  def __call__(self, size: Numbers) -> Amount:
    return self.coefficient * np.asarray(size, float) ** self.exponent

  @classmethod
  def through(cls, sizes: Numbers, amounts: Numbers) -> 'Growth':
    """By least squares of logarithms; proportional where one size is all."""
    x, y = np.asarray(sizes, float), np.asarray(amounts, float)
    if not y.any():
      return cls(0.0, 1.0)
    exponent = 1.0
    if len(np.unique(x)) > 1:
      exponent = float(np.polyfit(np.log(x), np.log(y), 1)[0])
    coefficient = float(np.exp(np.mean(np.log(y) - exponent * np.log(x))))
    worst = float(np.max(np.abs(coefficient * x**exponent / y - 1)))
    return cls(coefficient, exponent, worst)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """How the models of a law grow.

  FLOPs of training a token are a sum over parameters, so that 6 N is kept to
  beyond the runs: a power law through small models, whose head weighs much,
  would fall short of it.

  Attributes:
    counted: the parameters that are N.
    embeddings: parameters of embedding and head, by those of the rest.
    flops_per_body: FLOPs of training a token, for each parameter of the rest.
    flops_per_embedding: for each of embedding and head; attention is in both.
    worst: the largest relative difference of FLOPs from those of the runs.
  """

  counted: Counted
  embeddings: Growth = Growth(0.0, 1.0)
  flops_per_body: float = 6.0
  flops_per_embedding: float = 0.0
  worst: float = 0.0

  @classmethod
  def of_runs(cls, runs: Iterable[Run], counted: Counted) -> 'Shapes':
    """As runs have them."""
    runs = list(runs)
    body = np.array([run.parameters_without_embeddings for run in runs], float)
    total = np.array([run.parameters for run in runs], float)
    flops = np.array([run.flops / run.tokens for run in runs])
    parts = np.stack([body, total - body], -1)
    each, _ = optimize.nnls(parts / flops[:, None], np.ones(len(runs)))
    return cls(
      counted,
      Growth.through(body, total - body),
      float(each[0]),
      float(each[1]),
      float(np.max(np.abs(parts @ each / flops - 1))),
    )

  @functools.cached_property
  def _counted(self) -> Array:
    """N at each size of the table."""
    extra = self.embeddings(_BODY) if self.counted == 'all' else 0.0
    return _BODY + extra

  @property
  def smallest(self) -> float:
    """N at the start of the table: one parameter besides embeddings."""
    return float(self._counted[0])

  @property
  def largest(self) -> float:
    """N at the end of the table."""
    return float(self._counted[-1])

  def body(self, parameters: Numbers) -> Amount:
    """Parameters without embeddings of models of N."""
    if self.counted == 'without_embeddings':
      return np.asarray(parameters, float)
    return _between(parameters, self._counted, _BODY)

  def flops_per_token(self, parameters: Numbers) -> Amount:
    """FLOPs of training models of N, forward and backward."""
    body = self.body(parameters)
    head = self.flops_per_embedding * self.embeddings(body)
    return self.flops_per_body * body + head

  def invert(self, cost: Callable[[Array], Amount], limit: Numbers) -> Amount:
    """The largest N, to 1e18, whose rising cost keeps to a limit."""
    return _between(limit, cost(self._counted), self._counted)


@dataclasses.dataclass(frozen=True)
class Serving:
  """What serving takes. Every number is an assumption, to be overridden.

  Energy counts weights read from memory and their arithmetic; not the cache
  of keys and values, not leakage, cooling or the host. Memory: about 4 pJ a
  bit, as O'Connor et al. (MICRO 2017) put HBM2. Arithmetic: Horowitz (ISSCC
  2014), 45 nm, float16: 1.1 pJ to multiply and 0.4 pJ to add. Codes of a bit
  or a trit are taken to add only, which few chips make use of.

  Attributes:
    ternary_bits: a weight, packed: 1.6 in base_three, 2 in two_bit.
    binary_bits: a weight, packed.
    float_bits: a weight.
    embedding_bits: a parameter of embedding and head, in every family.
    embedding_read: their share that a token reads: the head, half of two.
    joules_per_byte: read from memory.
    joules_per_add: the arithmetic of a ternary or binary weight for a token.
    joules_per_multiply_add: that of a float weight.
    batch_size: tokens that share one reading of the weights.
  """

  ternary_bits: float = 1.6
  binary_bits: float = 1.0
  float_bits: float = 16.0
  embedding_bits: float = 16.0
  embedding_read: float = 0.5
  joules_per_byte: float = 32e-12
  joules_per_add: float = 0.4e-12
  joules_per_multiply_add: float = 1.5e-12
  batch_size: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value < float('inf'):
        raise ValueError(f'{field.name}={value} must be > 0')
    if self.embedding_read > 1:
      raise ValueError(f'embedding_read={self.embedding_read} must be <= 1')

  def bits(self, family: str) -> float:
    """A weight of a layer, as it is served."""
    return getattr(self, f'{family}_bits')

  def bytes(self, family: str, shapes: Shapes, parameters: Numbers) -> Amount:
    """Bytes of the weights of models of N."""
    body = shapes.body(parameters)
    embeddings = shapes.embeddings(body)
    return (self.bits(family) * body + self.embedding_bits * embeddings) / 8

  def joules_per_token(
    self, family: str, shapes: Shapes, parameters: Numbers
  ) -> Amount:
    """Energy that models of N take for one token of a batch."""
    body = shapes.body(parameters)
    head = self.embedding_read * shapes.embeddings(body)
    read = (self.bits(family) * body + self.embedding_bits * head) / 8
    multiplied = body + head if family == 'float' else head
    return (
      read * self.joules_per_byte / self.batch_size
      + multiplied * self.joules_per_multiply_add
      + (body + head - multiplied) * self.joules_per_add
    )


def _between(x: Numbers, xs: Amount, ys: Amount) -> Amount:
  """Interpolates logarithms in a table; 0 before it, its last after it."""
  return np.exp(np.interp(np.log(x), np.log(xs), np.log(ys), left=-np.inf))
