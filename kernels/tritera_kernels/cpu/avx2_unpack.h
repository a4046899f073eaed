// SPDX-License-Identifier: Apache-2.0
// Rows of packed bytes as vectors of digits. For avx2.cc alone.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernel.h"

namespace tritera {
namespace {

constexpr size_t kStep = 32;  // bytes of a vector

inline __m256i load(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

inline __m256i bytes(int value) { return _mm256_set1_epi8(value); }

// The packed rows follow each other, and so do these prefetches.
inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + (16 << 10), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p) + (1 << 10), _MM_HINT_T0);
}

// The last `count` < 32 bytes before `end`, then zeros: digits that are 0.
inline __m256i load_tail(const uint8_t* end, size_t count) {
  alignas(32) uint8_t copy[kStep] = {};
  memcpy(copy, end - count, count);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(copy));
}

// Nine times each byte: the two leading trits as a number 0..8, and the rest.
// The even and the odd bytes are multiplied apart.
inline void two_trits(__m256i v, __m256i* first, __m256i* second,
                      __m256i* rest) {
  const __m256i low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_maddubs_epi16(v, _mm256_set1_epi16(9));
  const __m256i odd = _mm256_maddubs_epi16(v, _mm256_set1_epi16(9 << 8));
  const __m256i pair = _mm256_or_si256(_mm256_srli_epi16(even, 8),
                                       _mm256_andnot_si256(low, odd));
  *rest = _mm256_or_si256(_mm256_and_si256(even, low),
                          _mm256_slli_epi16(odd, 8));
  *first = _mm256_shuffle_epi8(
      _mm256_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                       1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0),
      pair);
  *second = _mm256_shuffle_epi8(
      _mm256_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2,
                       0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0),
      pair);
}

template <Format format>
inline void unpack(__m256i v, __m256i* digits) {
  if (format == kTwoBit) {
    for (int j = 0; j < 4; ++j)
      digits[j] = _mm256_and_si256(_mm256_srli_epi16(v, 2 * j), bytes(3));
  } else {
    __m256i rest;
    two_trits(v, digits, digits + 1, &rest);
    two_trits(rest, digits + 2, digits + 3, &rest);
    // 3/4 of the rest, rounded up: only 85, 170 and 255 would be too large,
    // and the rests of valid bytes are in 0..80, 86..166 and 171..251 here.
    const __m256i half = _mm256_avg_epu8(rest, _mm256_setzero_si256());
    digits[4] = _mm256_and_si256(
        _mm256_srli_epi16(_mm256_avg_epu8(rest, half), 6), bytes(3));
  }
}

// The rows from `first` on, as if there were enough of them.
template <int count>
struct Pointers {
  const uint8_t* row[count];
  Pointers(const Rows& rows, int first) {
    for (int r = 0; r < count; ++r) {
      const int at = first + r < rows.count ? first + r : rows.count - 1;
      row[r] = rows.data + at * rows.stride;
    }
  }
};

}  // namespace
}  // namespace tritera
