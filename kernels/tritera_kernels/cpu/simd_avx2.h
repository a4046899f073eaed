// SPDX-License-Identifier: Apache-2.0
// Vectors of AVX2; simd_portable.h says what each name means.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace tritera {
namespace {

constexpr int kLanes = 8;
constexpr int kTileRows = 6;
constexpr int kTileColumns = 2;

using F = __m256;
using I = __m256i;

inline F broadcast(float x) { return _mm256_set1_ps(x); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline F load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
      16));
}
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F load_n(const float* p, int n) {
  return _mm256_maskload_ps(p, first(n));
}
template <class T>
inline F load_n(const T* p, int n) {
  if (n == kLanes) return load(p);
  T lanes[kLanes] = {};
  memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline void store_n(float* p, F x, int n) {
  _mm256_maskstore_ps(p, first(n), x);
}

inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F round_even(F x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline F power_of_two(__m256i n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline F scale_by_power(F x, F n) {
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  x = _mm256_mul_ps(x, power_of_two(half));
  return _mm256_mul_ps(x, power_of_two(_mm256_sub_epi32(whole, half)));
}
inline float reduce_add(F x) {
  __m128 y =
      _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float reduce_max(F x) {
  __m128 y =
      _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline I int_zero() { return _mm256_setzero_si256(); }
inline I abs_bits(F x) {
  return _mm256_and_si256(_mm256_castps_si256(x),
                          _mm256_set1_epi32(0x7fffffff));
}
inline I int_max(I a, I b) { return _mm256_max_epi32(a, b); }
inline I int_add(I a, I b) { return _mm256_add_epi32(a, b); }
inline int32_t int_reduce_max(I x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x),
                            _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(1, 0, 3, 2)));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(y);
}
inline int32_t int_reduce_add(I x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x),
                            _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(1, 0, 3, 2)));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, _MM_SHUFFLE(2, 3, 0, 1)));
  return _mm_cvtsi128_si32(y);
}
inline I to_int(F x) { return _mm256_cvtps_epi32(x); }
inline __m128i to_bytes(I x) {
  __m128i y = _mm_packs_epi32(_mm256_castsi256_si128(x),
                              _mm256_extracti128_si256(x, 1));
  return _mm_packs_epi16(y, y);
}
inline void store_int8(int8_t* p, I x) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), to_bytes(x));
}
inline void store_int8_n(int8_t* p, I x, int n) {
  int8_t lanes[kLanes];
  store_int8(lanes, x);
  memcpy(p, lanes, n);
}

}  // namespace
}  // namespace tritera
