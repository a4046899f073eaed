# SPDX-License-Identifier: Apache-2.0
"""A Llama-style decoder in NumPy float64, one token pair at a time.

Written from Spectra's description (pre-norm, RMSNorm with gain, RoPE over the
whole head, SwiGLU, no biases, untied head) and Llama's rotary convention as
Hugging Face stores it; W is [out, in] and quantised by tests.ternary.oracle.
BitNet's parts are those of arXiv 2402.17764 and 2504.12285.
"""

import numpy as np

from tests.ternary import oracle

COLUMN_BLOCKS = ('attention.o', 'mlp.down')


def rms_norm(x, gain, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def rope(x_Th, theta):
  """Rotates channel i with channel i + h/2 by position * theta^(-2i/h)."""
  T, h = x_Th.shape
  out = np.empty_like(x_Th)
  for t in range(T):
    for i in range(h // 2):
      angle = t * theta ** (-2 * i / h)
      a, b = x_Th[t, i], x_Th[t, i + h // 2]
      out[t, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, i + h // 2] = b * np.cos(angle) + a * np.sin(angle)
  return out


def wide(array):
  return np.asarray(array, np.float64)


def decoder(config, params, tokens, watch=lambda layer, name, x: None):
  """Logits [T, V] of one sequence; `watch` sees every linear layer's input."""
  p = params

  def linear(x, layer, name):
    watch(layer, name, x)
    part, leaf = name.split('.')
    w = wide(p['layers'][part][leaf]['kernel'][layer]).T
    axis = 'in' if name in COLUMN_BLOCKS else 'out'
    if config.family != 'float':
      quantise = {'ternary': oracle.ternary, 'binary': oracle.binary}
      _, w, _ = quantise[config.family](w, config.scale_blocks, axis)
    if config.input_norm:
      x = rms_norm(x, 1, config.norm_eps)
    if config.activation_bits:
      x = oracle.int8(x)
    return x @ w.T

  def gain(layer, name, part=None):
    norms = p['layers'][part] if part else p['layers']
    return wide(norms[name]['scale'][layer])

  x = wide(p['embed']['embedding'])[tokens]
  T = len(tokens)
  for layer in range(config.layers):
    y = x
    if not config.input_norm:
      y = rms_norm(x, gain(layer, 'attention_norm'), config.norm_eps)
    heads = []
    group = config.heads // config.kv_heads
    h = config.head_dim
    q, k, v = (linear(y, layer, f'attention.{n}') for n in 'qkv')
    for head in range(config.heads):
      kv = head // group
      q_Th, k_Th, v_Th = (
        q[:, head * h : (head + 1) * h],
        k[:, kv * h : (kv + 1) * h],
        v[:, kv * h : (kv + 1) * h],
      )
      if config.qk_norm:
        q_Th = rms_norm(
          q_Th, gain(layer, 'q_norm', 'attention'), config.norm_eps
        )
        k_Th = rms_norm(
          k_Th, gain(layer, 'k_norm', 'attention'), config.norm_eps
        )
      q_Th, k_Th = rope(q_Th, config.rope_theta), rope(k_Th, config.rope_theta)
      out = np.zeros((T, h))
      for t in range(T):
        score = k_Th[: t + 1] @ q_Th[t] / np.sqrt(h)
        weight = np.exp(score - score.max())
        out[t] = weight / weight.sum() @ v_Th[: t + 1]
      heads.append(out)
    y = np.concatenate(heads, 1)
    if config.sub_norm:
      y = rms_norm(y, gain(layer, 'sub_norm', 'attention'), config.norm_eps)
    x = x + linear(y, layer, 'attention.o')
    y = x
    if not config.input_norm:
      y = rms_norm(x, gain(layer, 'mlp_norm'), config.norm_eps)
    gate, up = linear(y, layer, 'mlp.gate'), linear(y, layer, 'mlp.up')
    if config.mlp_activation == 'relu2':
      y = np.where(gate > 0, gate, 0) ** 2 * up
    else:
      y = gate / (1 + np.exp(-gate)) * up
    if config.sub_norm:
      y = rms_norm(y, gain(layer, 'sub_norm', 'mlp'), config.norm_eps)
    x = x + linear(y, layer, 'mlp.down')
  x = rms_norm(x, wide(p['norm']['scale']), config.norm_eps)
  return x @ wide(p['head']['kernel'])
