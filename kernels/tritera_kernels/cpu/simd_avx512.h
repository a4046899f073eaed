// SPDX-License-Identifier: Apache-2.0
// Vectors of AVX-512; simd_portable.h says what each name means.
#pragma once

// GCC 12 takes its own intrinsics' undefined operands for a mistake.
#ifndef __clang__
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#ifndef __clang__
#pragma GCC diagnostic pop
#endif
#include <stddef.h>
#include <stdint.h>

namespace tritera {
namespace {

constexpr int kLanes = 16;
constexpr int kTileRows = 8;
constexpr int kTileColumns = 2;

using F = __m512;
using I = __m512i;

inline __mmask16 first(int n) {
  return static_cast<__mmask16>((1u << n) - 1);
}
inline F from_bfloat16(__m256i x) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline F from_int8(__m128i x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x));
}

inline F broadcast(float x) { return _mm512_set1_ps(x); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline F load(const int8_t* p) {
  return from_int8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load(const uint16_t* p) {
  return from_bfloat16(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F load_n(const float* p, int n) {
  return _mm512_maskz_loadu_ps(first(n), p);
}
inline F load_n(const int8_t* p, int n) {
  return from_int8(_mm_maskz_loadu_epi8(first(n), p));
}
inline F load_n(const uint16_t* p, int n) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(first(n), p));
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void store_n(float* p, F x, int n) {
  _mm512_mask_storeu_ps(p, first(n), x);
}

inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F round_even(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
}
inline F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
inline float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }

inline I int_zero() { return _mm512_setzero_si512(); }
inline I abs_bits(F x) {
  return _mm512_and_si512(_mm512_castps_si512(x),
                          _mm512_set1_epi32(0x7fffffff));
}
inline I int_max(I a, I b) { return _mm512_max_epi32(a, b); }
inline I int_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline int32_t int_reduce_max(I x) { return _mm512_reduce_max_epi32(x); }
inline int32_t int_reduce_add(I x) { return _mm512_reduce_add_epi32(x); }
inline I to_int(F x) { return _mm512_cvtps_epi32(x); }
inline void store_int8(int8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline void store_int8_n(int8_t* p, I x, int n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, first(n), x);
}

}  // namespace
}  // namespace tritera
