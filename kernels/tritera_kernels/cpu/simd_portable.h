// SPDX-License-Identifier: Apache-2.0
// Vectors of one lane, in plain C++. simd_*.h all define the same names.
//
// max and min give the second operand where either is NaN.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace tritera {
namespace {

constexpr int kLanes = 1;
// Of a block of products kept in registers; columns are vectors.
constexpr int kTileRows = 4;
constexpr int kTileColumns = 4;

using F = float;
using I = int32_t;

inline F broadcast(float x) { return x; }
inline F load(const float* p) { return *p; }
inline F load(const int8_t* p) { return *p; }
// bfloat16 bits.
inline F load(const uint16_t* p) {
  uint32_t bits = static_cast<uint32_t>(*p) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
// The first n lanes, 0 < n <= kLanes; zeros in the others.
template <class T>
inline F load_n(const T* p, int /*n*/) {
  return load(p);
}
inline void store(float* p, F x) { *p = x; }
inline void store_n(float* p, F x, int /*n*/) { *p = x; }

inline F add(F a, F b) { return a + b; }
inline F sub(F a, F b) { return a - b; }
inline F mul(F a, F b) { return a * b; }
inline F div(F a, F b) { return a / b; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
// Half to even; |x| < 2^22.
inline F round_even(F x) { return (x + 12582912.0f) - 12582912.0f; }
// x * 2^n, n an integer of -150 .. 128, or both NaN.
inline F scale_by_power(F x, F n) {
  int whole = n == n ? static_cast<int>(n) : 0, half = whole / 2;
  uint32_t bits[2] = {static_cast<uint32_t>(half + 127) << 23,
                      static_cast<uint32_t>(whole - half + 127) << 23};
  float powers[2];
  memcpy(powers, bits, 8);
  return x * powers[0] * powers[1];
}
inline float reduce_add(F x) { return x; }
inline float reduce_max(F x) { return x; }

inline I int_zero() { return 0; }
inline I abs_bits(F x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<int32_t>(bits & 0x7fffffff);
}
inline I int_max(I a, I b) { return a > b ? a : b; }
inline I int_add(I a, I b) { return a + b; }
inline int32_t int_reduce_max(I x) { return x; }
inline int32_t int_reduce_add(I x) { return x; }
inline I to_int(F x) { return static_cast<int32_t>(round_even(x)); }
inline void store_int8(int8_t* p, I x) { *p = static_cast<int8_t>(x); }
inline void store_int8_n(int8_t* p, I x, int /*n*/) { store_int8(p, x); }

}  // namespace
}  // namespace tritera
