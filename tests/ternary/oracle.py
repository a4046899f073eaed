# SPDX-License-Identifier: Apache-2.0
"""The ternary and binary layers in NumPy float64, from the paper's equations.

Written from arXiv 2407.12327, 3.1 and A.1, with W of shape [m, n] = [out, in]
as there: nothing is shared with the library, not even the orientation.
"""

import numpy as np

EPS = 1e-5


def blocks_of(w_mn, blocks, axis):
  """Views of W's scale blocks: along outputs (rows) or inputs (columns)."""
  return np.split(w_mn, blocks, axis={'out': 0, 'in': 1}[axis])


def join(parts, axis):
  return np.concatenate(parts, axis={'out': 0, 'in': 1}[axis])


def ternary(w_mn, blocks=1, axis='out'):
  """Codes and the matrix gamma * codes; gamma = eps + mean |W| a block."""
  codes, effective, gammas = [], [], []
  for part in blocks_of(np.asarray(w_mn, np.float64), blocks, axis):
    gamma = EPS + np.abs(part).mean()
    code = np.round(np.minimum(np.maximum(part / gamma, -1), 1))
    codes.append(code)
    effective.append(gamma * code)
    gammas.append(gamma)
  return join(codes, axis), join(effective, axis), np.array(gammas)


def binary(w_mn, blocks=1, axis='out'):
  """alpha * sign(W - mean W), alpha = mean |W|."""
  codes, effective, alphas = [], [], []
  for part in blocks_of(np.asarray(w_mn, np.float64), blocks, axis):
    alpha = np.abs(part).mean()
    code = np.where(part - part.mean() >= 0, 1.0, -1.0)
    codes.append(code)
    effective.append(alpha * code)
    alphas.append(alpha)
  return join(codes, axis), join(effective, axis), np.array(alphas)


def int8(x):
  """BitNet b1.58's activations, token by token, from its training code."""
  x = np.asarray(x, np.float64)
  scale = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
  return np.clip(np.rint(x * scale), -128, 127) / scale


def layer(x_bn, effective_mn, dy_bm):
  """Y = X W~^T, dX = dY W~, and the straight-through dW = dY^T X."""
  x, dy = np.asarray(x_bn, np.float64), np.asarray(dy_bm, np.float64)
  return x @ effective_mn.T, dy @ effective_mn, dy.T @ x
