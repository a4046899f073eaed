// SPDX-License-Identifier: Apache-2.0
// Row operations between the matmuls of a decoder, one table an instruction
// set. Everything is float32 in and out unless said.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

namespace tritera {

enum CacheType { kBfloat16, kInt8 };

// What becomes of the gate of an MLP: x / (1 + exp(-x)), or max(0, x)^2.
enum Gate { kSilu, kRelu2 };
constexpr int kGates = 2;

// Attention of some query tokens of one sequence over one key/value head.
// Query t is at position start + t and sees slots 0 .. start + t.
struct Attend {
  const float* q;     // token t, head i at q + t * q_stride + i * width
  size_t q_stride;
  int tokens;
  int heads;          // query heads that share this key/value head
  int width;          // of a head, h
  int64_t start;
  const void* k;      // [h, slots]: transposed, so that lanes are slots
  const void* v;      // [slots, h]
  const float* k_scale;  // [slots], or null unless the cache is int8
  const float* v_scale;
  int64_t slots;
  CacheType type;
  float* y;           // token t, head i at y + t * y_stride + i * width
  size_t y_stride;
  float* scratch;     // of attend_scratch() floats, 64-byte aligned
};

struct Ops {
  // int8 activations of one token, as tritera_kernels.matmul.reference
  // .quantize_activations gives them to the bit, laid out by `planes` with
  // zeros as padding; sums[s] = the sum of q over segment s. Returns the
  // token's scale.
  float (*quantize)(const float* x, const Planes& planes, int8_t* q,
                    int32_t* sums);
  // The same layout, float32.
  void (*spread)(const float* x, const Planes& planes, float* out);
  // y = x / sqrt(mean(x^2) + epsilon) * gain; y may be x.
  void (*rms_norm)(const float* x, const float* gain, size_t n, float epsilon,
                   float* y);
  // y = f(gate) * up, f by its Gate.
  void (*gated[kGates])(const float* gate, const float* up, size_t n,
                        float* y);
  // RoPE in place: channels i and i + width / 2 of each of `heads` heads are
  // turned by the angle whose cosine and sine are cos[i], sin[i].
  void (*rotate)(float* x, int heads, int width, const float* cos,
                 const float* sin);
  // Puts one token's key and value (width floats each) into slot `slot`.
  void (*store_kv)(const float* k, const float* v, int width, int64_t slots,
                   int64_t slot, CacheType type, void* k_cache, void* v_cache,
                   float* k_scale, float* v_scale);
  size_t (*attend_scratch)(int tokens, int heads, int width, int64_t seen);
  void (*attend)(const Attend&);
};

// One table an instruction set, of which `kernel.h` says when it is null.
const Ops* portable_ops();
const Ops* avx2_ops();
const Ops* avx512_ops();
const Ops* neon_ops();

}  // namespace tritera
