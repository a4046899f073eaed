// SPDX-License-Identifier: Apache-2.0
// `Ops` written once over the vectors of a simd_*.h, included before this.
#pragma once

#include <string.h>

#include "attend_inline.h"
#include "exponential_inline.h"
#include "ops.h"

namespace tritera {
namespace {

constexpr float kInverse127 = 1.0f / 127;
// Below this a row counts as zero: 127 / absmax would leave float32.
constexpr float kSmallestAbsmax = 1e-30f;

struct Scales {
  float forward;   // x to q, or 0 where q is all 0
  float backward;  // q to x
};

// The maximum is taken over bits, so that a NaN wins.
inline Scales scales_of(const float* x, size_t n) {
  I bits = int_zero();
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    bits = int_max(bits, abs_bits(load(x + i)));
  if (i < n) bits = int_max(bits, abs_bits(load_n(x + i, n - i)));
  int32_t most = int_reduce_max(bits);
  float absmax;
  memcpy(&absmax, &most, 4);
  if (most >= 0x7f800000) return {0, __builtin_nanf("")};
  if (absmax < kSmallestAbsmax) return {0, 0};
  return {127 / absmax, absmax * kInverse127};
}

// q = round(x * forward); returns the sum of q. |x * forward| < 127.5, so that
// nothing need be clipped.
inline int32_t to_int8(const float* x, size_t n, float forward, int8_t* q) {
  I sums = int_zero();
  F factor = broadcast(forward);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    I rounded = to_int(mul(load(x + i), factor));
    sums = int_add(sums, rounded);
    store_int8(q + i, rounded);
  }
  if (i < n) {
    I rounded = to_int(mul(load_n(x + i, n - i), factor));
    sums = int_add(sums, rounded);
    store_int8_n(q + i, rounded, n - i);
  }
  return int_reduce_add(sums);
}

// Inputs of plane `plane`: the last planes of a segment may lack some or all.
inline size_t inputs_of(const Planes& planes, int plane) {
  size_t before = plane * planes.bytes;
  if (before >= planes.inputs) return 0;
  size_t left = planes.inputs - before;
  return left < planes.bytes ? left : planes.bytes;
}

float quantize(const float* x, const Planes& planes, int8_t* q,
               int32_t* sums) {
  Scales scales = scales_of(x, planes.segments * planes.inputs);
  if (scales.forward == 0) {  // x may be NaN
    memset(q, 0, planes.segments * planes.planes * planes.plane);
    memset(sums, 0, planes.segments * sizeof(int32_t));
    return scales.backward;
  }
  for (int segment = 0; segment < planes.segments; ++segment) {
    int32_t sum = 0;
    for (int plane = 0; plane < planes.planes; ++plane, q += planes.plane) {
      size_t n = inputs_of(planes, plane);
      sum += to_int8(x, n, scales.forward, q);
      memset(q + n, 0, planes.plane - n);
      x += n;
    }
    sums[segment] = sum;
  }
  return scales.backward;
}

void spread(const float* x, const Planes& planes, float* out) {
  for (int segment = 0; segment < planes.segments; ++segment) {
    for (int plane = 0; plane < planes.planes; ++plane, out += planes.plane) {
      size_t n = inputs_of(planes, plane);
      memcpy(out, x, n * sizeof(float));
      memset(out + n, 0, (planes.plane - n) * sizeof(float));
      x += n;
    }
  }
}

// Partial sums of a few vectors, added up in double.
inline double sum_of_squares(const float* x, size_t n) {
  constexpr int kSums = 4;
  constexpr size_t kPart = 32 * kSums * kLanes;
  double total = 0;
  size_t i = 0;
  while (i < n) {
    size_t end = n - i > kPart ? i + kPart : n;
    F sums[kSums];
    for (F& sum : sums) sum = broadcast(0);
    for (; i + kSums * kLanes <= end; i += kSums * kLanes) {
      for (int j = 0; j < kSums; ++j) {
        F value = load(x + i + j * kLanes);
        sums[j] = fma(value, value, sums[j]);
      }
    }
    for (; i < end; i += kLanes) {
      int left = end - i < kLanes ? end - i : kLanes;
      F value = load_n(x + i, left);
      sums[0] = fma(value, value, sums[0]);
    }
    i = end;
    total += reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  }
  return total;
}

void rms_norm(const float* x, const float* gain, size_t n, float epsilon,
              float* y) {
  double mean = sum_of_squares(x, n) / n;
  F factor = broadcast(1 / __builtin_sqrt(mean + epsilon));
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, mul(mul(load(x + i), factor), load(gain + i)));
  if (i < n) {
    int left = n - i;
    F turned = mul(mul(load_n(x + i, left), factor), load_n(gain + i, left));
    store_n(y + i, turned, left);
  }
}

struct Silu {
  static F of(F x) {
    F one = broadcast(1);
    return div(x, add(one, exponential(sub(broadcast(0), x))));
  }
};

struct Relu2 {
  static F of(F x) {
    F positive = max(broadcast(0), x);  // in this order a NaN stays one
    return mul(positive, positive);
  }
};

template <class Function>
void gated(const float* gate, const float* up, size_t n, float* y) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(y + i, mul(Function::of(load(gate + i)), load(up + i)));
  if (i < n) {
    int left = n - i;
    F f = Function::of(load_n(gate + i, left));
    store_n(y + i, mul(f, load_n(up + i, left)), left);
  }
}

void rotate(float* x, int heads, int width, const float* cos,
            const float* sin) {
  int half = width / 2;
  for (int head = 0; head < heads; ++head, x += width) {
    for (int i = 0; i < half; i += kLanes) {
      int left = half - i < kLanes ? half - i : kLanes;
      F a = load_n(x + i, left), b = load_n(x + half + i, left);
      F c = load_n(cos + i, left), s = load_n(sin + i, left);
      store_n(x + i, sub(mul(a, c), mul(b, s)), left);
      store_n(x + half + i, add(mul(b, c), mul(a, s)), left);
    }
  }
}

// To nearest even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// An int8 row whose elements lie `step` apart; returns its scale.
inline float store_int8_row(const float* x, int width, int64_t step,
                            int8_t* out) {
  Scales scales = scales_of(x, width);
  for (int from = 0; from < width; from += 64) {
    int n = width - from < 64 ? width - from : 64;
    int8_t q[64] = {};
    if (scales.forward != 0) to_int8(x + from, n, scales.forward, q);
    for (int i = 0; i < n; ++i) out[(from + i) * step] = q[i];
  }
  return scales.backward;
}

void store_kv(const float* k, const float* v, int width, int64_t slots,
              int64_t slot, CacheType type, void* k_cache, void* v_cache,
              float* k_scale, float* v_scale) {
  if (type == kInt8) {
    k_scale[slot] = store_int8_row(k, width, slots,
                                   static_cast<int8_t*>(k_cache) + slot);
    v_scale[slot] = store_int8_row(
        v, width, 1, static_cast<int8_t*>(v_cache) + slot * width);
    return;
  }
  uint16_t* keys = static_cast<uint16_t*>(k_cache) + slot;
  uint16_t* values = static_cast<uint16_t*>(v_cache) + slot * width;
  for (int i = 0; i < width; ++i) keys[i * slots] = to_bfloat16(k[i]);
  for (int i = 0; i < width; ++i) values[i] = to_bfloat16(v[i]);
}

constexpr Ops kOps = {
    quantize,       spread,
    rms_norm,       {gated<Silu>, gated<Relu2>},
    rotate,         store_kv,
    attend_scratch, attend};

}  // namespace
}  // namespace tritera
