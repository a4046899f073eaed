# SPDX-License-Identifier: Apache-2.0
"""A checkpoint to convert: what its files hold is decided, nothing is read."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Literal

from jaxtyping import Float, Float32
import numpy as np

from tritera_jax.checkpoint.pack import Matrix
from tritera_jax.interop.huggingface import (
  config_file,
  contents,
  matrices,
  names,
)
from tritera_jax.interop.huggingface.config_file import Description
from tritera_jax.interop.huggingface.contents import Dtype, Weights
from tritera_jax.interop.huggingface.safetensors_file import TensorFiles
from tritera_jax.ternary import latents
from tritera_kernels import fingerprint


class Source:
  """A folder's tensors, read one by one. Shapes: N outputs, K inputs.

  Attributes:
    folder: of config.json and safetensors.
    described: what config.json says.
    weights: what the blocks' matrices hold.
    model: of the run or packed model to be made.
    tensors: in the order of the forward pass.
  """

  def __init__(
    self,
    folder: Path,
    files: TensorFiles,
    described: Description,
    weights: Weights | None,
    dtype: Dtype | None,
    activation_bits: Literal[8] | None,
  ):
    contents.check_tensors(files, described, folder)
    self.folder, self.described = folder, described
    self.weights: Weights = contents.decide(files, described, weights)
    self.model = contents.model_of(
      described, self.weights, dtype, activation_bits
    )
    self.tensors = list(
      names.tensors(self.model, described.architecture).values()
    )
    self._files = files

  @property
  def linears(self) -> list[names.Tensor]:
    return [tensor for tensor in self.tensors if tensor.linear is not None]

  @property
  def scale_dtypes(self) -> set[str]:
    """What the matrices' scales are known in, as safetensors calls it."""
    return {self._scale_dtype(tensor) for tensor in self.linears}

  def _scale_dtype(self, tensor: names.Tensor) -> str:
    stored = self._files.tensors[tensor.theirs].dtype
    if self.weights == 'latents' or self.described.weight_scale == 'divisor':
      return 'F32'  # they are computed
    if self.described.weight_scale is None:
      return stored  # each is in every value
    if stored in contents.FLOATS:
      factor = contents.factor(self._files, self.described, tensor)
      return stored if factor == 1 else 'F32'  # a product
    return self._files.tensors[f'{tensor.module}.weight_scale'].dtype

  def matrix(self, tensor: names.Tensor) -> Matrix:
    """Codes and scales of one of `linears`, of a model that is ternary.

    Raises:
      ValueError: its values are not ternary, or one or a scale is NaN or
        infinite: its place is named.
    """
    blocks, axis = contents.blocks(self.model, tensor)
    if self.weights == 'ternary':
      codes_NK, scale_S = contents.ternary(
        self._files, self.described, self.model, tensor
      )
    else:
      codes_KN, scale_S = latents.ternarized(
        self.values(tensor).T, blocks, axis, self.model.scale_floor
      )
      codes_NK = np.asarray(codes_KN).T
    return Matrix(tensor.name, codes_NK, np.asarray(scale_S), axis)

  def values(self, tensor: names.Tensor) -> Float32[np.ndarray, 'N K']:
    """Latents, or a FloatLM's values, of one of `linears`.

    Raises:
      ValueError: one is NaN or infinite, or a scale is none.
    """
    return contents.values(self._files, self.described, tensor)

  def rest(self, tensor: names.Tensor) -> Float[np.ndarray, '...']:
    """A tensor that is none of `linears`, as it is stored there.

    Raises:
      ValueError: a value is NaN or infinite, or head and embedding differ that
        are said to be one.
    """
    stored = tensor.theirs
    if self._tied(tensor):
      stored = 'model.embed_tokens.weight'
    values = self._files.read(stored)
    if (
      self._tied(tensor)
      and tensor.theirs in self._files.tensors
      and not np.array_equal(self._files.read(tensor.theirs), values)
    ):
      raise ValueError(
        f'{self._files.path}: config.json says tie_word_embeddings=true, and '
        f'{tensor.theirs} is not model.embed_tokens.weight; set false, or '
        'delete the tensor'
      )
    matrices.check_finite(values, self._files.where(stored))
    return values

  def _tied(self, tensor: names.Tensor) -> bool:
    return tensor.name == 'head' and self.described.tied

  @property
  def tokenizer(self) -> Path:
    return self.folder / 'tokenizer.json'

  def check_tokenizer(self):
    """See `contents.check_tokenizer`."""
    contents.check_tokenizer(self.tokenizer, self.described.model)

  def fingerprint(self) -> str:
    """Of the codes and scales that are stored; reads them all."""
    return fingerprint.trit_fingerprint(map(self.matrix, self.linears))

  def where(self, tensor: names.Tensor) -> str:
    """File and name, for errors."""
    return self._files.where(tensor.theirs)

  def check_fingerprint(self, stored: str | None):
    """Compares with what a file of ours says.

    Raises:
      ValueError: it says something else.
    """
    if stored and self.described.fingerprint not in (None, stored):
      raise ValueError(
        f'{self.folder}: its codes and scales have {stored}, config.json says '
        f'{self.described.fingerprint}; if the weights were changed since they '
        'were exported, delete the object "tritera" from config.json'
      )


@contextlib.contextmanager
def opened(
  folder: Path,
  *,
  weights: Weights | None = None,
  dtype: Dtype | None = None,
  activation_bits: Literal[8] | None = None,
) -> Iterator[Source]:
  """A folder of config.json and safetensors; `importing` has the arguments.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the files contradict each other or the arguments, or are of a
      model that ours cannot be.
  """
  described = config_file.read_config(folder / 'config.json')
  with TensorFiles(folder) as files:
    yield Source(folder, files, described, weights, dtype, activation_bits)
