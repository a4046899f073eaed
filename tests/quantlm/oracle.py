# SPDX-License-Identifier: Apache-2.0
"""GPTQ a weight at a time, as Optimal Brain Quantization states it.

Frantar et al., arXiv 2210.17323, equations 2 and 3: weight k is rounded, the
others move by -(w_k - q_k) / [H^-1]_kk [H^-1]_:k, and row and column k are
removed from H^-1 by elimination. No Cholesky factor, no blocks. W is
[outputs, inputs].
"""

import numpy as np


def fit(w, bits, symmetric):
  """Scale (to float16, upwards) and zero of the weights of a group."""
  low, high = min(w.min(), 0.0), max(w.max(), 0.0)
  if symmetric:
    high = max(-low, high)
    low = -high
  levels = 2**bits - 1
  scale = np.float16((high - low) / levels)
  if float(scale) < (high - low) / levels:
    scale = np.nextafter(scale, np.float16(np.inf))
  scale = float(scale)
  return scale, 2 ** (bits - 1) if symmetric else round(-low / scale)


def code(w, scale, zero, bits):
  return int(min(max(round(w / scale) + zero, 0), 2**bits - 1))


def gptq(w, gram, bits, group, symmetric, damping):
  """Codes and values, [outputs, inputs]."""
  outputs, inputs = w.shape
  hessian = 2 * gram.astype(np.float64)
  hessian += damping * np.mean(np.diag(hessian)) * np.eye(inputs)
  codes, values = np.zeros(w.shape, int), np.zeros(w.shape)
  for n in range(outputs):
    row = w[n].astype(np.float64)
    inverse = np.linalg.inv(hessian)
    for k in range(inputs):
      if k % group == 0:
        scale, zero = fit(row[k : k + group], bits, symmetric)
      codes[n, k] = code(row[k], scale, zero, bits)
      values[n, k] = scale * (codes[n, k] - zero)
      step = (row[k] - values[n, k]) / inverse[k, k]
      row -= step * inverse[:, k]
      inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
      inverse[k, :] = inverse[:, k] = 0  # but for rounding it is
  return codes, values
