// SPDX-License-Identifier: Apache-2.0
// Vectors of NEON (aarch64); simd_portable.h says what each name means, but
// here max and min give NaN where either operand is.
#pragma once

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace tritera {
namespace {

constexpr int kLanes = 4;
constexpr int kTileRows = 8;
constexpr int kTileColumns = 2;

using F = float32x4_t;
using I = int32x4_t;

inline F broadcast(float x) { return vdupq_n_f32(x); }
inline F load(const float* p) { return vld1q_f32(p); }
inline F load(const int8_t* p) {
  uint32_t bytes;
  memcpy(&bytes, p, 4);
  int16x8_t halves = vmovl_s8(vcreate_s8(bytes));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves)));
}
inline F load(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
template <class T>
inline F load_n(const T* p, int n) {
  if (n == kLanes) return load(p);
  T lanes[kLanes] = {};
  memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
inline void store(float* p, F x) { vst1q_f32(p, x); }
inline void store_n(float* p, F x, int n) {
  float lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, n * sizeof(float));
}

inline F add(F a, F b) { return vaddq_f32(a, b); }
inline F sub(F a, F b) { return vsubq_f32(a, b); }
inline F mul(F a, F b) { return vmulq_f32(a, b); }
inline F div(F a, F b) { return vdivq_f32(a, b); }
inline F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
inline F max(F a, F b) { return vmaxq_f32(a, b); }
inline F min(F a, F b) { return vminq_f32(a, b); }
inline F round_even(F x) { return vrndnq_f32(x); }
inline F power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(
      vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
inline F scale_by_power(F x, F n) {
  int32x4_t whole = vcvtq_s32_f32(n), half = vshrq_n_s32(whole, 1);
  x = vmulq_f32(x, power_of_two(half));
  return vmulq_f32(x, power_of_two(vsubq_s32(whole, half)));
}
inline float reduce_add(F x) { return vaddvq_f32(x); }
inline float reduce_max(F x) { return vmaxvq_f32(x); }

inline I int_zero() { return vdupq_n_s32(0); }
inline I abs_bits(F x) {
  return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7fffffff));
}
inline I int_max(I a, I b) { return vmaxq_s32(a, b); }
inline I int_add(I a, I b) { return vaddq_s32(a, b); }
inline int32_t int_reduce_max(I x) { return vmaxvq_s32(x); }
inline int32_t int_reduce_add(I x) { return vaddvq_s32(x); }
inline I to_int(F x) { return vcvtnq_s32_f32(x); }
inline void store_int8_n(int8_t* p, I x, int n) {
  int16x4_t halves = vmovn_s32(x);
  int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
  uint64_t lanes = vget_lane_u64(vreinterpret_u64_s8(bytes), 0);
  memcpy(p, &lanes, n);
}
inline void store_int8(int8_t* p, I x) { store_int8_n(p, x, kLanes); }

}  // namespace
}  // namespace tritera
