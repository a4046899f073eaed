# SPDX-License-Identifier: Apache-2.0
"""The decoder's shape, and the table of its linear layers."""

import dataclasses
from typing import Literal, NamedTuple

from tritera_jax.ternary import quantize
from tritera_jax.ternary.quantize import Family, ScaleAxis


class LinearSpec(NamedTuple):
  """One linear layer of a block: W [in_features, out_features].

  `scale_axis` is the axis along which scale blocks lie; `axes` names the two
  logical axes, which `parallel.rules` maps onto a mesh.
  """

  in_features: int
  out_features: int
  scale_axis: ScaleAxis
  axes: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A Llama-style decoder of one weight family (Spectra, Table 3).

  Four fields make BitNet b1.58's of it; `experiments/bitnet_b158.py` says which
  of its two versions takes what.

  Invariants: heads is a multiple of kv_heads; head_dim is even (RoPE);
  scale_blocks divides every blocked axis.

  Attributes:
    family: 'ternary' (TriLM), 'binary' (BiLM) or 'float' (FloatLM).
    vocab_size: tokens of the tokenizer; the embedding and head are padded to
      `padded_vocab_size` rows.
    layers: number of blocks, L.
    d_model: width of the residual stream, D.
    d_ff: width of the gated MLP, F.
    heads: query heads, H.
    kv_heads: key and value heads, G; G = H is multi-head attention.
    head_dim: width of a head, h.
    context_length: longest sequence, in tokens.
    scale_blocks: scales a matrix: the paper's model-parallel degree, here a
      setting of the model and never an effect of the mesh. Blocks lie along
      outputs for q, k, v, gate, up and along inputs for o, down.
    scale_floor: a ternary scale is max(1e-5, mean|W|), as BitNet's, and not
      1e-5 + mean|W|.
    vocab_multiple: embedding and head are padded to a multiple of this for
      each scale block (Spectra A.1); 1: they are not.
    qk_norm: RMSNorm with gain on each query and key head (Spectra-1.1).
    mlp_activation: of the MLP's gate: 'silu' (SwiGLU), or 'relu2', ReLU
      squared.
    sub_norm: RMSNorm with gain on what o and down take.
    input_norm: RMSNorm without gain on what every linear layer of a block
      takes, and none before attention and MLP.
    activation_bits: 8: what those layers take is rounded to int8, token by
      token (`ternary.activations`); None: it is not.
    rope_theta: base of the rotary frequencies.
    norm_eps: epsilon of every RMSNorm.
    init_std: standard deviation of initial weights; o and down divide it by
      sqrt(2 L). (The papers do not state theirs.)
    document_separator: id of the token before each document: what follows it
      does not attend to what is before it, and positions start again at it.
      None: attention crosses documents, as in the papers' training code, and
      as a fused attention without a mask needs.
    dtype: compute dtype. Latents, norms' statistics, sums and logits are
      float32 whatever it is.
  """

  family: Family
  vocab_size: int
  layers: int
  d_model: int
  d_ff: int
  heads: int
  kv_heads: int
  head_dim: int
  context_length: int
  scale_blocks: int = 1
  scale_floor: bool = False
  vocab_multiple: int = 128
  qk_norm: bool = False
  mlp_activation: Literal['silu', 'relu2'] = 'silu'
  sub_norm: bool = False
  input_norm: bool = False
  activation_bits: Literal[8] | None = None
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  init_std: float = 0.02
  document_separator: int | None = None
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    for field in (
      'vocab_size', 'layers', 'd_model', 'd_ff', 'heads', 'kv_heads',
      'head_dim', 'context_length', 'scale_blocks', 'vocab_multiple',
    ):  # fmt: skip
      if getattr(self, field) < 1:
        raise ValueError(f'model.{field}={getattr(self, field)} must be >= 1')
    if self.heads % self.kv_heads:
      raise ValueError(
        f'model.kv_heads={self.kv_heads} must divide model.heads={self.heads}'
      )
    separator = self.document_separator
    if separator is not None and not 0 <= separator < self.vocab_size:
      raise ValueError(
        f'model.document_separator={separator} must be an id of the '
        f'vocabulary of {self.vocab_size}, or None'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'model.head_dim={self.head_dim} must be even: RoPE turns pairs'
      )
    for name, spec in self.linears.items():
      try:
        quantize.check_blocks(spec[:2], self.scale_blocks, spec.scale_axis)
      except ValueError as error:
        raise ValueError(f'model.scale_blocks: {name}: {error}') from None

  @property
  def padded_vocab_size(self) -> int:
    """Rows of embedding and head."""
    multiple = self.vocab_multiple
    if multiple > 1:
      multiple *= self.scale_blocks
    return -(-self.vocab_size // multiple) * multiple

  @property
  def linears(self) -> dict[str, LinearSpec]:
    """The linear layers of one block by name, in the order they are used."""
    d, f = self.d_model, self.d_ff
    q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
    return {
      'attention.q': LinearSpec(d, q, 'out', ('embed', 'heads')),
      'attention.k': LinearSpec(d, kv, 'out', ('embed', 'kv_heads')),
      'attention.v': LinearSpec(d, kv, 'out', ('embed', 'kv_heads')),
      'attention.o': LinearSpec(q, d, 'in', ('heads', 'embed')),
      'mlp.gate': LinearSpec(d, f, 'out', ('embed', 'mlp')),
      'mlp.up': LinearSpec(d, f, 'out', ('embed', 'mlp')),
      'mlp.down': LinearSpec(f, d, 'in', ('mlp', 'embed')),
    }
