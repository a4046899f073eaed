# SPDX-License-Identifier: Apache-2.0
"""Matmuls and memory of one device's share, read off the traced program.

The share is the experiment's model with its heads, MLP and vocabulary divided
by mesh.tensor, on its rows of the batch.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from jax.extend import core
import jax.numpy as jnp

from tritera_jax.experiment import Experiment, RunConfig
from tritera_jax.model import decoder
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import step


def share(experiment: Experiment, sizes: dict[str, int]) -> Experiment:
  """One device's model and one row, as an experiment of its own.

  Scales do not matter here, and their blocks need not fit.
  """
  model, run, parts = experiment.model, experiment.run, sizes['tensor']
  return dataclasses.replace(
    experiment,
    model=dataclasses.replace(
      model,
      vocab_size=model.padded_vocab_size // parts,
      d_ff=model.d_ff // parts,
      heads=model.heads // parts,
      kv_heads=model.kv_heads // parts,
      scale_blocks=1,
      document_separator=None,
    ),
    data=dataclasses.replace(
      experiment.data,
      batch_size=1,
      sequence_length=experiment.data.sequence_length // sizes['context'],
    ),
    # The optimizer has no matmuls but Muon's, which the mesh divides.
    optimizer=dataclasses.replace(experiment.optimizer, muon=None, diloco=None),
    run=alone(run),
    mesh=MeshConfig(),
  )


def alone(run: RunConfig) -> RunConfig:
  """Of one device, whose matrices are whole: nothing is gathered."""
  return dataclasses.replace(run, accumulation=1, gather='auto')


def varied(share: Experiment, rows: int = 1, remat=None, layers=None):
  model, run = share.model, share.run
  return dataclasses.replace(
    share,
    model=dataclasses.replace(model, layers=layers or model.layers),
    data=dataclasses.replace(share.data, batch_size=rows),
    run=dataclasses.replace(run, remat=remat or run.remat),
  )


@functools.lru_cache(maxsize=1024)
def counts(share: Experiment) -> tuple[float, float]:
  """FLOPs of the matmuls of a step, and the bytes that they touch."""
  jaxpr = jax.make_jaxpr(functools.partial(step.train_step, share))(
    jax.eval_shape(lambda: step.init_state(share)), _tokens(share, 1), 0
  )
  return matmuls(jaxpr.jaxpr)


def _tokens(share: Experiment, more: int = 0) -> jax.ShapeDtypeStruct:
  shape = share.data.batch_size, share.data.sequence_length + more
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def matmuls(jaxpr: core.Jaxpr) -> tuple[float, float]:
  """FLOPs, and bytes of operands and results, of all products in a program.

  A loop's body counts as often as it runs, if that is known.
  """
  work = moved = 0.0
  for equation in jaxpr.eqns:
    params = equation.params
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
      depth = math.prod(avals[0].shape[axis] for axis in contracted)
      work += 2 * math.prod(avals[-1].shape) * depth
      moved += sum(math.prod(a.shape) * a.dtype.itemsize for a in avals)
    times = params['length'] if equation.primitive.name == 'scan' else 1
    for inner in _programs(params):
      more = matmuls(inner)
      work, moved = work + times * more[0], moved + times * more[1]
  return work, moved


def _programs(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The programs inside an equation."""
  found = []
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        found.append(item.jaxpr)
      elif isinstance(item, core.Jaxpr):
        found.append(item)
  return found


@functools.lru_cache(maxsize=1024)
def residuals(share: Experiment) -> tuple[float, float]:
  """Bytes that the forward pass of the blocks keeps for the backward pass.

  Activations, and what has the shape of weights (codes, casts): a mesh
  divides these by fsdp too. Latents themselves are kept anyway.
  """
  params = decoder.abstract_params(share.model)

  def backward(params, tokens_BT):
    def forward(params):
      model = decoder.bind(share.model, params)
      return model.hidden(tokens_BT, remat=share.run.remat)[0]

    return jax.vjp(forward, params)[1]

  kept = jax.tree.leaves(jax.eval_shape(backward, params, _tokens(share)))
  shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
  activations = weights = 0.0
  for leaf in kept:
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    if leaf.shape not in shapes:
      activations += nbytes
    elif leaf.dtype != jnp.float32:
      weights += nbytes
  return activations, weights


def muon_flops(experiment: Experiment) -> float:
  """Of Newton-Schulz: X X^T, its square and their product with X, a time."""
  muon = experiment.optimizer.muon
  if muon is None:
    return 0.0
  total = 0.0
  for spec in experiment.model.linears.values():
    m, n = sorted((spec.in_features, spec.out_features))
    total += 4 * m * m * n + 2 * m**3
  return muon.iterations * experiment.model.layers * total


def ring_flops(share: Experiment, sizes: dict[str, int]) -> float:
  """Of a row's attention to what other devices of its sequence hold.

  The share attends within its own T / c tokens. A ring does half of its
  T / c x T, the causal one, in whole blocks.
  """
  c = sizes['context']
  model, T = share.model, share.data.sequence_length
  others = max(0.0, (c / 2 - 1) * T * T)
  products = 2 * model.heads * model.head_dim * others
  passes = 2 * (3 if share.run.remat == 'none' else 4)
  return passes * model.layers * products
