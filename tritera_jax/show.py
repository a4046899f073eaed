# SPDX-License-Identifier: Apache-2.0
"""What an experiment would train, from shapes alone: nothing is allocated.

What it would take on a machine is `tritera_jax.plan`.
"""

from tritera_jax.experiment import Experiment
from tritera_jax.model import flops
from tritera_jax.model.config import ModelConfig


def describe(experiment: Experiment) -> str:
  """Shape, parameter counts, bits, FLOPs and token budget, a line each."""
  model, data, run = experiment.model, experiment.data, experiment.run
  schedule = experiment.optimizer.schedule
  count = flops.parameters(model)
  linear = flops.linear_parameters(model)
  per_token = flops.training_flops_per_token(model, data.sequence_length)
  lines = [
    ('family', f'{model.family}, compute in {model.dtype}'),
    (
      'shape',
      f'{model.layers} layers, d_model {model.d_model}, d_ff {model.d_ff}, '
      f'{model.heads} heads of {model.head_dim} ({model.kv_heads} for k, v), '
      f'vocabulary {model.vocab_size:,} (padded to '
      f'{model.padded_vocab_size:,}), {model.scale_blocks} scale block(s)'
      f'{_variations(model)}',
    ),
    (
      'parameters',
      f'{count:,}: {linear:,} in linear layers, '
      f'{flops.embedding_parameters(model):,} in embedding and head, '
      f'{flops.norm_parameters(model):,} in norms',
    ),
    (
      'size',
      f'{flops.size_bits(model) / 1e9:.2f} Gbit as the papers count it '
      f'({flops.PAPER_BITS[model.family]:g} bits a linear weight, 16 the rest, '
      'vocabulary without padding)',
    ),
    (
      'tokens',
      f'{experiment.tokens:,} = {run.steps:,} steps x {data.batch_size:,} x '
      f'{data.sequence_length:,} ({experiment.batch_tokens:,} a step), '
      f'{experiment.tokens / count:.1f} a parameter',
    ),
    (
      'compute',
      f'{per_token:.3g} FLOPs a token, {per_token * experiment.tokens:.3g} '
      'in all (forward and backward, matmuls and attention)',
    ),
    ('schedule', str(schedule)),
    ('mesh', str(experiment.mesh)),
    ('data', data.path),
    ('run', run.folder),
  ]
  width = max(len(name) for name, _ in lines)
  return '\n'.join(f'{name:<{width}}  {text}' for name, text in lines)


def _variations(model: ModelConfig) -> str:
  """What it has beside a TriLM's parts."""
  parts = {
    'QK-norm': model.qk_norm,
    'squared ReLU': model.mlp_activation == 'relu2',
    'sub-norms': model.sub_norm,
    'a norm before each linear layer': model.input_norm,
    'int8 activations': model.activation_bits == 8,
  }
  return ''.join(f', {part}' for part, there in parts.items() if there)
