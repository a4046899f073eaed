# SPDX-License-Identifier: Apache-2.0
"""Per-token losses and gradients at a run's checkpoints, written to files.

`tritera_jax.scaling.dynamics.files` reads them.

A token's gradient is that of its own loss alone, to the float32 parameters of
the blocks and the last norm: embedding and head are left out, as in arXiv
2506.05447. Of a TriLM it is the straight-through one, which training uses and
which is no derivative of its loss. All is computed in float32 whatever the
run's dtype, since the differences are smaller than bfloat16's steps, and on
one device, which has to hold the run's whole state and `chunk` gradients.
"""

from collections.abc import Callable, Iterable
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any
import zipfile

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32
import numpy as np

from tritera_jax.checkpoint import restore, save
from tritera_jax.data import loader, shards
from tritera_jax.model import decoder
from tritera_jax.model.config import ModelConfig
from tritera_jax.model.decoder import Params
from tritera_jax.parallel import mesh as mesh_lib
from tritera_jax.parallel.mesh import MeshConfig
from tritera_jax.train import loop, loss, metrics, recovery, step

_LEFT_OUT = 'embed', 'head'


@dataclasses.dataclass(frozen=True)
class Tokens:
  """The held-out tokens that are measured, and how many at once.

  Attributes:
    losses: tokens from the start of the split, in windows of the run's
      sequence length, whose losses are compared.
    gradients: of these, the first whose gradients are; each takes a backward
      pass of its window. Of N independent normal gradients D is
      1 - 1 / sqrt(N): compare what was measured with one N alone.
    rows: windows at once, for losses.
    chunk: gradients at once.
  """

  losses: int = 16_384
  gradients: int = 512
  rows: int = 16
  chunk: int = 16

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) < 1:
        raise ValueError(
          f'tokens.{field.name}={getattr(self, field.name)} must be >= 1'
        )


@functools.partial(jax.jit, static_argnames=('config', 'rows'))
def token_losses(
  config: ModelConfig,
  params: Params,
  windows_WT1: Int32[Array, 'W T1'],
  *,
  rows: int,
) -> Float32[Array, 'W T']:
  """The loss of each token of each window but the first, in nats."""
  return jax.lax.map(
    functools.partial(_window_losses, config, params),
    windows_WT1,
    batch_size=rows,
  )


def _window_losses(config, params, window_T1) -> Float32[Array, ' T']:
  logits_1TV, _ = decoder.bind(config, params)(window_T1[None, :-1])
  return loss.token_losses(logits_1TV, window_T1[None, 1:])[0]


@functools.partial(jax.jit, static_argnames=('config', 'chunk'))
def gradient_sums(
  config: ModelConfig,
  params: Params,
  update: Params,
  windows_WT1: Int32[Array, 'W T1'],
  *,
  chunk: int,
) -> tuple[Params, Params, Float32[Array, 'W T']]:
  """Sums over all tokens of their gradients g_i, and of |g_i|.

  Args:
    config: of the model.
    params: all of them.
    update: what was added to them, of `differentiated` leaves.
    windows_WT1: the tokens.
    chunk: gradients that exist at once.

  Returns:
    sum_i g_i and sum_i |g_i|, each shaped as `update`, and of each token
    sum_j g_ij update_j.
  """
  inner = differentiated(params)

  def add_window(sums, window_T1):
    _, pullback = jax.vjp(
      lambda inner: _window_losses(config, {**params, **inner}, window_T1),
      inner,
    )
    T = len(window_T1) - 1
    chunks = -(-T // chunk)
    # Rows past T are zeros, and so are their gradients.
    which_NCT = jnp.eye(chunks * chunk, T).reshape(chunks, chunk, T)

    def add_chunk(sums, which_CT):
      [grads] = jax.vmap(pullback)(which_CT)
      along_C = jnp.zeros(chunk)
      for g, u in zip(
        jax.tree.leaves(grads), jax.tree.leaves(update), strict=True
      ):
        along_C += jnp.tensordot(g, u, u.ndim)
      signed, absolute = sums
      return (
        jax.tree.map(lambda s, g: s + g.sum(0), signed, grads),
        jax.tree.map(lambda s, g: s + jnp.abs(g).sum(0), absolute, grads),
      ), along_C

    sums, along_NC = jax.lax.scan(add_chunk, sums, which_NCT)
    return sums, along_NC.reshape(-1)[:T]

  zeros = jax.tree.map(jnp.zeros_like, inner)
  (signed, absolute), along_WT = jax.lax.scan(
    add_window, (zeros, zeros), windows_WT1
  )
  return signed, absolute, along_WT


def differentiated(params: Params) -> Params:
  """The parameters whose gradients are measured."""
  return {k: v for k, v in params.items() if k not in _LEFT_OUT}


def collect(
  run: str | Path,
  out: str | Path,
  tokens: Tokens = Tokens(),
  progress: Callable[[Iterable], Iterable] = iter,
):
  """Measures a run at its checkpoints of steps 1, 2, 4, 8, ...

  At each: the losses of held-out tokens, these losses after the update that
  the run made next (or, at its end, would make), and that update beside the
  tokens' gradients. Writes OUT/training.npz, the training losses, and
  OUT/step_N.npz. A file of the same state and tokens is left as it is.

  Args:
    run: run folder, trained with run.keep_powers.
    out: folder for the files.
    tokens: which, and how many at once.
    progress: wraps the iterable of steps, as tqdm does.

  Raises:
    FileNotFoundError: no such run, checkpoint or dataset.
    ValueError: fewer than two such checkpoints, or too little held-out text.
  """
  experiment, out = save.read_experiment(run), Path(out)
  with restore.committed(run) as (checkpoints, _):
    steps = [s for s in sorted(checkpoints.all_steps()) if s & (s - 1) == 0]
  if len(steps) < 2:
    raise ValueError(
      f'{run} has checkpoints of steps {steps} among 1, 2, 4, 8, ..., and two '
      'are needed; train with --run.keep-powers'
    )
  held_out = shards.open_split(experiment.data.path, 'validation')
  windows = _windows(held_out, experiment.data.sequence_length, tokens.losses)
  out.mkdir(parents=True, exist_ok=True)
  _write_training(run, out / 'training.npz', experiment.model.family)
  measure = _Measure(run, experiment, windows, tokens, held_out.fingerprint)
  for at in progress(steps):
    measure(at, out / f'step_{at}.npz')


def _windows(source, T: int, tokens: int) -> Int32[np.ndarray, 'W T1']:
  whole = min(tokens, source.tokens) // T
  if not whole:
    raise ValueError(
      f'{tokens} of the {source.tokens} held-out tokens of {source.root} fill '
      f'no window of data.sequence_length={T}; raise tokens.losses'
    )
  inputs_WT, targets_WT, _ = loader.windows(source, T, T, whole * T)
  return np.concatenate([inputs_WT, targets_WT[:, -1:]], axis=1)


class _Measure:
  """Measures one state after the other; all is compiled once."""

  def __init__(self, run, experiment, windows_WT1, tokens: Tokens, text: str):
    self.run, self.tokens, self.text = run, tokens, text
    data = experiment.data
    self.windows_WT1 = jnp.asarray(windows_WT1)
    self.few_WT1 = self.windows_WT1[
      : -(-tokens.gradients // data.sequence_length)
    ]
    self.config = dataclasses.replace(experiment.model, dtype='float32')
    alone = dataclasses.replace(experiment, mesh=MeshConfig())
    self.mesh = mesh_lib.make_mesh(alone.mesh, jax.local_devices()[:1])
    self.update = step.jitted(alone, self.mesh)
    self.skipped = recovery.read(Path(run))
    self.batches = loader.batches(
      loop.open_sources(experiment),
      data.schedule,
      batch_size=data.batch_size,
      sequence_length=data.sequence_length,
      seed=data.seed,
    )

  def __call__(self, at: int, file: Path):
    _, state = loop.restore_run(
      self.run, at, jax.local_devices()[:1], MeshConfig()
    )
    made_of = json.dumps(
      {
        'state': f'{int(save.digest(state)):08x}',
        'text': self.text,
        'losses': self.windows_WT1.size,
        'gradients': self.few_WT1.size,
      }
    )
    if _made_of(file) == made_of:
      return
    batch = self.batches[recovery.batch_of(at, self.skipped)]
    assert batch is not None  # nothing is filtered
    before = jax.tree.map(jnp.copy, state.params)  # `update` takes the state
    with jax.set_mesh(self.mesh):
      after, _ = self.update(state, batch['tokens'], np.int32(at))
    moved = jax.tree.map(
      jnp.subtract, differentiated(after.params), differentiated(before)
    )
    losses, losses_after = (
      token_losses(self.config, params, self.windows_WT1, rows=self.tokens.rows)
      for params in (before, after.params)
    )
    signed, absolute, along = gradient_sums(
      self.config, before, moved, self.few_WT1, chunk=self.tokens.chunk
    )
    _write(
      file,
      made_of=np.array(made_of),
      step=np.int64(at),
      losses=np.ravel(losses),
      losses_after=np.ravel(losses_after),
      predicted=np.ravel(along),
      gradient_sums=_flat(signed),
      gradient_absolutes=_flat(absolute),
      update=_flat(moved),
    )


def _flat(tree: Any) -> Float32[np.ndarray, ' P']:
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _made_of(file: Path) -> str | None:
  try:
    with np.load(file, allow_pickle=False) as arrays:
      return str(arrays['made_of'])
  except (OSError, ValueError, KeyError, zipfile.BadZipFile):
    return None  # none, or damaged: it is written anew


def _write_training(run, file: Path, family: str):
  records = metrics.read(run)
  _write(
    file,
    family=np.array(family),
    steps=np.array([r['step'] for r in records], np.int64),
    losses=np.array([r['loss'] for r in records], np.float64),
  )


def _write(file: Path, **arrays):
  partial = file.with_suffix('.partial')
  with partial.open('wb') as opened:
    np.savez(opened, allow_pickle=False, **arrays)
  partial.rename(file)
