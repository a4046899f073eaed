// SPDX-License-Identifier: Apache-2.0
#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace tritera {
namespace {

// Query tokens of one head group that a thread takes at once.
constexpr int kQueryBlock = 64;
// Scores and products below this are not worth a helper.
constexpr int64_t kAttendAlone = 1 << 17;

// cos, then sin, of a position's angles: float32 angles, as the reference's.
// A decoder asks for the same ones in every layer.
struct Angles {
  int64_t position = -1;
  int width = 0;
  float theta = 0;
  std::vector<float> values;
};

const float* angles(int64_t position, int width, float theta) {
  thread_local Angles last;
  if (last.position == position && last.width == width && last.theta == theta)
    return last.values.data();
  const int half = width / 2;
  last = {position, width, theta, std::vector<float>(width)};
  for (int i = 0; i < half; ++i) {
    const float frequency = static_cast<float>(
        std::pow(static_cast<double>(theta), -static_cast<double>(i) / half));
    const float angle = static_cast<float>(position) * frequency;
    last.values[i] = std::cos(angle);
    last.values[half + i] = std::sin(angle);
  }
  return last.values.data();
}

// x of n values, normed into `row` unless `gain` is null.
const float* normed(const Ops& ops, const float* x, const float* gain, int64_t n,
                    float epsilon, float* row) {
  if (!gain) return x;
  ops.rms_norm(x, gain, n, epsilon, row);
  return row;
}

}  // namespace

void norm_multiply(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
                   const float* x, const float* gain, float epsilon,
                   const Matrix* matrices, int count, float* y) {
  const int64_t K = matrices[0].inputs;
  int64_t width = 0;
  for (int i = 0; i < count; ++i) width += matrices[i].outputs;
  Product products[3];
  float* at = y;
  for (int i = 0; i < count; ++i) {
    products[i] = {matrices[i], {at, width, nullptr}};
    at += matrices[i].outputs;
  }
  multiply(
      team, kernel, tokens, int8,
      [&](int64_t t, float* row) {
        return normed(*kernel.ops, x + t * K, gain, K, epsilon, row);
      },
      products, count);
}

void multiply_add(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
                  const float* x, const float* gain, float epsilon,
                  const Matrix& matrix, const float* residual, float* y) {
  const int64_t K = matrix.inputs;
  const Product product{matrix, {y, matrix.outputs, residual}};
  multiply(
      team, kernel, tokens, int8,
      [&](int64_t t, float* row) {
        return normed(*kernel.ops, x + t * K, gain, K, epsilon, row);
      },
      &product, 1);
}

void gated_multiply_add(Team& team, const Kernel& kernel, int64_t tokens,
                        bool int8, const float* gate_up, Gate gate,
                        const float* gain, float epsilon, const Matrix& matrix,
                        const float* residual, float* y) {
  const int64_t F = matrix.inputs;
  const Product product{matrix, {y, matrix.outputs, residual}};
  multiply(
      team, kernel, tokens, int8,
      [&](int64_t t, float* row) {
        const float* from = gate_up + t * 2 * F;
        kernel.ops->gated[gate](from, from + F, F, row);
        return normed(*kernel.ops, row, gain, F, epsilon, row);
      },
      &product, 1);
}

void attention(Team& team, const Kernel& kernel, const Batch& batch,
               const AttentionShape& shape, const float* qkv,
               const float* q_gain, const float* k_gain, const Cache& cache,
               float* y) {
  const Ops& ops = *kernel.ops;
  const int h = shape.width, H = shape.heads, G = shape.kv_heads;
  const int64_t M = batch.count(), X = shape.qkv(), S = shape.slots;
  const size_t element = shape.type == kInt8 ? 1 : 2;
  const int64_t slot_bytes = S * h * element;  // of one row's key/value head
  // Queries after norm and RoPE; keys pass through the same memory.
  float* turned = static_cast<float*>(thread_memory(
      kTokensSlot, (M * (H + G) * h + h) * sizeof(float)));
  const int64_t turned_width = int64_t{H + G} * h;

  auto place = [&](int t) {
    const int64_t row = t / batch.tokens;
    const int64_t position = batch.start[row] + t % batch.tokens;
    float* own = turned + t * turned_width;
    const float* from = qkv + t * X;
    if (q_gain) {
      for (int i = 0; i < H + G; ++i) {
        ops.rms_norm(from + i * h, i < H ? q_gain : k_gain, h, shape.epsilon,
                     own + i * h);
      }
    } else {
      std::copy_n(from, turned_width, own);
    }
    const float* turn = angles(position, h, shape.theta);
    ops.rotate(own, H + G, h, turn, turn + h / 2);
    for (int g = 0; g < G; ++g) {
      const int64_t head = row * G + g;
      ops.store_kv(own + (H + g) * h, from + (H + G + g) * h, h, S, position,
                   shape.type, static_cast<char*>(cache.k) + head * slot_bytes,
                   static_cast<char*>(cache.v) + head * slot_bytes,
                   cache.k_scale ? cache.k_scale + head * S : nullptr,
                   cache.v_scale ? cache.v_scale + head * S : nullptr);
    }
  };
  if (M < 16) {
    for (int64_t t = 0; t < M; ++t) place(static_cast<int>(t));
  } else {
    team.run(static_cast<int>(M), place);
  }

  const int R = H / G;
  const int64_t blocks = (batch.tokens + kQueryBlock - 1) / kQueryBlock;
  int64_t work = 0;
  for (int64_t b = 0; b < batch.rows; ++b)
    work += (batch.start[b] + batch.tokens) * batch.tokens * H * h;
  auto attend = [&](int chunk) {
    // The last queries see most: they go first.
    const int64_t block = blocks - 1 - chunk / (batch.rows * G);
    const int64_t head = chunk % (batch.rows * G);
    const int64_t row = head / G, g = head % G;
    const int64_t first = block * kQueryBlock;
    const int64_t t = row * batch.tokens + first;
    const int tokens =
        static_cast<int>(std::min<int64_t>(kQueryBlock, batch.tokens - first));
    Attend a;
    a.q = turned + t * turned_width + g * R * h;
    a.q_stride = turned_width;
    a.tokens = tokens;
    a.heads = R;
    a.width = h;
    a.start = batch.start[row] + first;
    a.k = static_cast<char*>(cache.k) + head * slot_bytes;
    a.v = static_cast<char*>(cache.v) + head * slot_bytes;
    a.k_scale = cache.k_scale ? cache.k_scale + head * S : nullptr;
    a.v_scale = cache.v_scale ? cache.v_scale + head * S : nullptr;
    a.slots = S;
    a.type = shape.type;
    a.y_stride = int64_t{H} * h;
    a.y = y + t * a.y_stride + g * R * h;
    a.scratch = static_cast<float*>(thread_memory(
        kScratchSlot,
        ops.attend_scratch(tokens, R, h, a.start + tokens) * sizeof(float)));
    ops.attend(a);
  };
  const int chunks = static_cast<int>(blocks * batch.rows * G);
  if (work < kAttendAlone) {
    for (int i = 0; i < chunks; ++i) attend(i);
  } else {
    team.run(chunks, attend);
  }
}

void layer(Team& team, const Kernel& kernel, const Batch& batch,
           const AttentionShape& shape, Gate gate, bool int8,
           const LayerWeights& weights, const Cache& cache, float* x) {
  const int64_t M = batch.count();
  const int64_t X = shape.qkv(), A = int64_t{shape.heads} * shape.width;
  const int64_t F = weights.down.inputs;
  float* wide = static_cast<float*>(thread_memory(
      kStepSlot, M * (std::max(X, 2 * F) + A) * sizeof(float)));
  float* narrow = wide + M * std::max(X, 2 * F);
  const Matrix qkv[] = {weights.q, weights.k, weights.v};
  norm_multiply(team, kernel, M, int8, x, weights.attention_norm,
                shape.epsilon, qkv, 3, wide);
  attention(team, kernel, batch, shape, wide, weights.q_gain, weights.k_gain,
            cache, narrow);
  multiply_add(team, kernel, M, int8, narrow, weights.o_gain, shape.epsilon,
               weights.o, x, x);
  const Matrix gate_up[] = {weights.gate, weights.up};
  norm_multiply(team, kernel, M, int8, x, weights.mlp_norm, shape.epsilon,
                gate_up, 2, wide);
  gated_multiply_add(team, kernel, M, int8, wide, gate, weights.down_gain,
                     shape.epsilon, weights.down, x, x);
}

}  // namespace tritera
