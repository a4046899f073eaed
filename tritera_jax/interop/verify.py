# SPDX-License-Identifier: Apache-2.0
"""Whether two artefacts hold the same trits and scales.

An artefact is a run, a packed folder, a Hugging Face checkpoint or a GGUF file.
Each is read as (name, codes, scales, axis) of one matrix after another, and
codes must be the same. Scales must be too, once both are rounded to the coarser
of the types that the two keep them in: a checkpoint in float16 has no float32.
Beside a Hugging Face checkpoint they may be as far off as an import may make
them (`latents.MOST_ULPS`), and how far is said. The scale of a block of zeros
multiplies nothing and is not compared; nor are embeddings, norms and heads.

Shapes: N outputs, K inputs, S scale blocks.
"""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Float32
import numpy as np

from tritera_jax.checkpoint import pack, packed_file, restore, save
from tritera_jax.checkpoint.pack import Matrix
from tritera_jax.interop.gguf import gguf_file, layout
from tritera_jax.interop.huggingface import new_folder, source
from tritera_jax.model.config import ModelConfig
from tritera_jax.ternary import latents
from tritera_kernels import fingerprint, packed

Kind = Literal['run', 'packed', 'huggingface', 'gguf']
# From fine to coarse.
Kept = Literal['float32', 'float16', 'bfloat16']
_KEPT: tuple[Kept, ...] = ('float32', 'float16', 'bfloat16')
_STORED: dict[str, Kept] = {'F16': 'float16', 'BF16': 'bfloat16'}


class Artefact(NamedTuple):
  """A model somewhere on disk.

  Attributes:
    path: of it.
    kind: what it is.
    config: its model; None: the file does not say which scales it has.
    kept: the type that scales have there.
    read: its matrices, layer by layer, of that model.
  """

  path: Path
  kind: Kind
  config: ModelConfig | None
  kept: Kept
  read: Callable[[ModelConfig], Iterator[Matrix]]


class Same(NamedTuple):
  """What two artefacts have in common.

  Attributes:
    matrices: how many.
    weights: in all of them.
    scales: the type in which scales are equal.
    ulps: the most that two are apart, in units of a float32's last place.
    fingerprint: of the codes and of the first one's scales in that type.
  """

  matrices: int
  weights: int
  scales: Kept
  ulps: int
  fingerprint: str

  def __str__(self) -> str:
    how = '' if self.scales == 'float32' else f', rounded to {self.scales}'
    if self.ulps:
      how = f' but for {self.ulps} in the last place of a float32'
    return (
      f'the same trits and scales: {self.weights:,} weights in {self.matrices} '
      f'matrices, scales equal{how}; {self.fingerprint}; embeddings, norms and '
      'head are not compared'
    )


class DifferenceError(ValueError):
  """Two artefacts differ; the message says where first."""


def verify(a: str | Path, b: str | Path, *, progress=iter) -> Same:
  """Compares two artefacts.

  Args:
    a: run folder, packed folder, Hugging Face folder or GGUF file.
    b: another.
    progress: wraps the iterable of matrices, as tqdm does.

  Raises:
    DifferenceError: they differ: the first matrix and index, and what is there.
    FileNotFoundError: there is nothing of these kinds.
    ValueError: one is damaged, or holds no codes.
  """
  for path in a, b:
    new_folder.check_whole(Path(path))
  first, second = open_artefact(a), open_artefact(b)
  config = first.config or second.config
  if config is None:
    raise ValueError(
      f'neither {a} nor {b} says how many scales a matrix has; compare each '
      'with the checkpoint that it was made of'
    )
  kept = _coarsest(first.kept, second.kept)
  weights, most, matrices = 0, 0, []
  pairs = itertools.zip_longest(
    first.read(first.config or config), second.read(second.config or config)
  )

  def compared() -> Iterator[Matrix]:
    nonlocal weights, most
    for one, other in progress(pairs):
      scale_S, ulps = _compare(one, other, first, second, kept)
      most = max(most, ulps)
      weights += one.codes_NK.size
      matrices.append(one.name)
      yield one._replace(scale_S=scale_S)

  proof = fingerprint.trit_fingerprint(compared())
  return Same(len(matrices), weights, kept, most, proof)


def _coarsest(*kept: Kept) -> Kept:
  return max(kept, key=_KEPT.index)


def _compare(
  one: Matrix | None,
  other: Matrix | None,
  first: Artefact,
  second: Artefact,
  kept: Kept,
) -> tuple[Float32[np.ndarray, ' S'], int]:
  """The first one's scales, and how many ulps they are off at most."""
  if one is None or other is None or one.name != other.name:
    raise DifferenceError(
      f'{first.path} goes on with {one.name if one else "nothing"}, '
      f'{second.path} with {other.name if other else "nothing"}'
    )
  for what, here, there in (
    ('shape', one.codes_NK.shape, other.codes_NK.shape),
    ('scales', len(one.scale_S), len(other.scale_S)),
    ('axis of scales', one.axis, other.axis),
  ):
    if here != there and (what != 'axis of scales' or len(one.scale_S) > 1):
      raise DifferenceError(
        f'{one.name}: {what} {here} in {first.path}, {there} in {second.path}'
      )
  wrong = one.codes_NK != other.codes_NK
  if wrong.any():
    n, k = np.unravel_index(np.argmax(wrong), wrong.shape)
    raise DifferenceError(
      f'{one.name}: the code of output {n}, input {k} is '
      f'{one.codes_NK[n, k]} in {first.path}, {other.codes_NK[n, k]} in '
      f'{second.path}; {wrong.sum():,} of {wrong.size:,} differ'
    )
  here_S, there_S = (
    pack.seen_scales(*matrix[1:]).astype(jnp.dtype(kept)).astype(np.float32)
    for matrix in (one, other)
  )
  ulps = 0
  if kept == 'float32':
    ulps_S = latents.ulps_apart(here_S, there_S)
    may = 'huggingface' in (first.kind, second.kind)
    apart_S = ulps_S > (latents.MOST_ULPS if may else 0)
    ulps = int(ulps_S.max())
  else:
    # bfloat16 of a float16 is not always the bfloat16 of what both were.
    twice = {first.kept, second.kept} == {'float16', 'bfloat16'}
    apart_S = np.abs(here_S - there_S) > (2**-7 if twice else 0) * here_S
  if apart_S.any():
    block = int(np.argmax(apart_S))
    raise DifferenceError(
      f'{one.name}: scale {block} is {one.scale_S[block]} in {first.path}, '
      f'{other.scale_S[block]} in {second.path}: not equal in {kept}'
    )
  return here_S, ulps


def open_artefact(path: str | Path) -> Artefact:
  """What lies at a path, by what is in it.

  Raises:
    FileNotFoundError: nothing that is known.
    ValueError: it is damaged, or holds no codes.
  """
  path = Path(path)
  if path.is_file():
    return _gguf(path)
  if (path / 'experiment.json').is_file():
    config = save.read_experiment(path).model
    if config.family == 'float':
      raise ValueError(f'{path} is of a FloatLM, which has no codes')
    return Artefact(path, 'run', config, 'float32', lambda _: _run(path))
  if (path / 'config.json').is_file():
    return _huggingface(path)
  if (path / 'model.safetensors').is_file():
    model = packed_file.read(path)
    return Artefact(
      path, 'packed', model.config, 'float32', lambda _: _packed(model)
    )
  raise FileNotFoundError(
    f'{path} is no GGUF file, and no folder with experiment.json (a run), '
    'config.json (Hugging Face) or model.safetensors (packed)'
  )


def matrices(path: str | Path) -> Iterator[Matrix]:
  """All of an artefact that says of itself which scales it has."""
  artefact = open_artefact(path)
  if artefact.config is None:
    raise ValueError(f'{path} does not say how many scales a matrix has')
  return artefact.read(artefact.config)


def _run(path: Path) -> Iterator[Matrix]:
  experiment, params = restore.restore_params(path)
  yield from pack.matrices(experiment.model, params)


def _packed(model: packed_file.PackedModel) -> Iterator[Matrix]:
  for layer in range(model.config.layers):
    for linear in model.config.linears:
      name = f'layers.{layer}.{linear}'
      matrix = model.matrices[name]
      codes_NK, scale_S = map(np.asarray, packed.unpack(matrix))
      axis = model.config.linears[linear].scale_axis
      yield Matrix(name, codes_NK, scale_S, axis)


def _huggingface(folder: Path) -> Artefact:
  with source.opened(folder) as found:
    if found.weights == 'float':
      raise ValueError(f'{folder} is of a FloatLM, which has no codes')
    kinds: list[Kept] = [
      _STORED.get(dtype, 'float32') for dtype in found.scale_dtypes
    ]

  def read(_: ModelConfig) -> Iterator[Matrix]:
    with source.opened(folder) as found:
      yield from map(found.matrix, found.linears)

  return Artefact(folder, 'huggingface', found.model, _coarsest(*kinds), read)


def _gguf(path: Path) -> Artefact:
  file = gguf_file.read(path)
  if 'tritera.model' in file.metadata:
    return Artefact(
      path, 'gguf', layout.read_config(file), 'float32',
      lambda _: layout.read_matrices(file),
    )  # fmt: skip
  return Artefact(
    path, 'gguf', None, 'float16',
    lambda config: layout.read_foreign(file, config),
  )  # fmt: skip
