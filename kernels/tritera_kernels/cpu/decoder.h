// SPDX-License-Identifier: Apache-2.0
// A decoder layer's operations: those of tritera_kernels.fused.
#pragma once

#include <stdint.h>

#include "kernel.h"
#include "matmul.h"
#include "ops.h"
#include "parallel.h"

namespace tritera {

// Tokens of a call: B rows of T tokens, the rows one after another. Row b's
// first token is at position start[b].
struct Batch {
  int64_t rows;
  int64_t tokens;  // of a row
  const int32_t* start;

  int64_t count() const { return rows * tokens; }
};

struct AttentionShape {
  int heads;
  int kv_heads;
  int width;      // of a head
  float theta;    // base of RoPE
  float epsilon;  // of every norm
  CacheType type;
  int64_t slots;

  int64_t qkv() const { return int64_t{width} * (heads + 2 * kv_heads); }
};

// A layer's keys and values, as tritera_kernels.fused.cache.KVCache.
struct Cache {
  void* k;
  void* v;
  float* k_scale;  // null unless int8
  float* v_scale;
};

struct LayerWeights {
  const float* attention_norm;
  const float* mlp_norm;
  Matrix q, k, v, o, gate, up, down;
  // Of the norms of heads, and of what o and down take; null: there is none.
  const float* q_gain;
  const float* k_gain;
  const float* o_gain;
  const float* down_gain;
};

// y [M, sum of N] = norm(x) W^T of each matrix, side by side.
void norm_multiply(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
                   const float* x, const float* gain, float epsilon,
                   const Matrix* matrices, int count, float* y);

// y [M, N] = residual + x W^T, where x is normed first unless `gain` is null;
// y may be residual.
void multiply_add(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
                  const float* x, const float* gain, float epsilon,
                  const Matrix& matrix, const float* residual, float* y);

// The same of f(gate) up, f by `gate`, where gate_up is [M, 2 K].
void gated_multiply_add(Team& team, const Kernel& kernel, int64_t tokens,
                        bool int8, const float* gate_up, Gate gate,
                        const float* gain, float epsilon, const Matrix& matrix,
                        const float* residual, float* y);

// y [M, heads * width]; writes the new keys and values into `cache`.
void attention(Team& team, const Kernel& kernel, const Batch& batch,
               const AttentionShape& shape, const float* qkv,
               const float* q_gain, const float* k_gain, const Cache& cache,
               float* y);

// x [M, D] past one layer, in place.
void layer(Team& team, const Kernel& kernel, const Batch& batch,
           const AttentionShape& shape, Gate gate, bool int8,
           const LayerWeights& weights, const Cache& cache, float* x);

}  // namespace tritera
