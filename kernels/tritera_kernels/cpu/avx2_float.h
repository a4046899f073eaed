// SPDX-License-Identifier: Apache-2.0
// Dots of float32 inputs. For avx2.cc alone.
#pragma once

#include "avx2_unpack.h"

namespace tritera {
namespace {

constexpr int kLanes = 8;  // rows of dot_float

// Four bytes of each of eight rows in each of out[0 .. 7].
inline void transpose(const __m256i v[kLanes], __m256i* out) {
  __m256i a[kLanes], b[kLanes];
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] =
          _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    out[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
  }
}

// `count` tokens as [group][plane][token][4]: planes and tokens may be powers
// of two apart, of which a cache holds few.
template <int planes, int count>
void gather(const Tokens<float>& tokens, int first, size_t groups, float* out) {
  const float* x = tokens.x + first * tokens.token;
  for (size_t g = 0; g < groups; ++g, x += 4) {
    for (int j = 0; j < planes; ++j) {
      for (int t = 0; t < count; ++t, out += 4)
        _mm_store_ps(out, _mm_load_ps(x + t * tokens.token + j * tokens.plane));
    }
  }
}

// Eight rows, four bytes of each at a time, and `count` tokens.
//
// A product is exact. Four are added in a chain and the chains of the planes
// in a tree, at most 6 roundings of float32 on the way of a product; then come
// doubles, and 1 rounding at the end: 7 / 2 eps of sum |code * x|.
template <Format format, int count>
void float_tile(const __m256i* packed, size_t groups, const float* x,
                float* sums) {
  constexpr int kPlanes = kDigitsPerByte[format];
  const __m256 codes = _mm256_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0);
  __m256d low[count], high[count];
  for (int t = 0; t < count; ++t) low[t] = high[t] = _mm256_setzero_pd();
  for (size_t g = 0; g < groups; ++g) {
    __m256i digits[kPlanes];
    if (format == kBaseThree) unpack<format>(packed[g], digits);
    __m256 sum[count] = {}, even[count] = {};
#pragma GCC unroll 5
    for (int j = 0; j < kPlanes; ++j) {
      __m256 chain[count];
      for (int i = 0; i < 4; ++i) {
        // permutevar looks at the two lowest bits.
        const __m256i digit =
            format == kTwoBit ? _mm256_srli_epi32(packed[g], 8 * i + 2 * j)
                              : _mm256_srli_epi32(digits[j], 8 * i);
        const __m256 code = _mm256_permutevar_ps(codes, digit);
        for (int t = 0; t < count; ++t) {
          const __m256 in = _mm256_broadcast_ss(x + 4 * t + i);
          chain[t] = i == 0 ? _mm256_mul_ps(code, in)
                            : _mm256_fmadd_ps(code, in, chain[t]);
        }
      }
      x += 4 * count;
      for (int t = 0; t < count; ++t) {
        if (j == 0) {
          sum[t] = chain[t];
        } else if (j == 2) {
          even[t] = chain[t];
        } else {
          if (j == 3) chain[t] = _mm256_add_ps(even[t], chain[t]);
          sum[t] = _mm256_add_ps(sum[t], chain[t]);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      low[t] = _mm256_add_pd(
          low[t], _mm256_cvtps_pd(_mm256_castps256_ps128(sum[t])));
      high[t] = _mm256_add_pd(
          high[t], _mm256_cvtps_pd(_mm256_extractf128_ps(sum[t], 1)));
    }
  }
  for (int t = 0; t < count; ++t) {
    _mm_storeu_ps(sums + t * kLanes, _mm256_cvtpd_ps(low[t]));
    _mm_storeu_ps(sums + t * kLanes + 4, _mm256_cvtpd_ps(high[t]));
  }
}

template <Format format, int count>
void float_tokens(const Rows& rows, const Tokens<float>& tokens, int t,
                  float* sums, uint8_t* scratch) {
  constexpr int kPlanes = kDigitsPerByte[format];
  const size_t groups = (rows.bytes + 3) / 4;
  __m256i* packed = reinterpret_cast<__m256i*>(scratch);
  float* x = reinterpret_cast<float*>(packed + (groups + 7) / 8 * 8);
  gather<kPlanes, count>(tokens, t, groups, x);
  for (int first = 0; first < rows.count; first += kLanes) {
    const Pointers<kLanes> at(rows, first);
    for (size_t p = 0; p < rows.bytes; p += kStep) {
      __m256i v[kLanes];
      const size_t left = rows.bytes - p;
      for (int r = 0; r < kLanes; ++r) {
        const uint8_t* row = at.row[r] + p;
        if (p % (2 * kStep) == 0) prefetch(row);
        v[r] = left < kStep ? load_tail(row + left, left) : load(row);
      }
      transpose(v, packed + p / 4);
    }
    alignas(32) float each[count * kLanes];
    float_tile<format, count>(packed, groups, x, each);
    const int some = rows.count - first < kLanes ? rows.count - first : kLanes;
    for (int i = 0; i < count; ++i) {
      memcpy(sums + static_cast<size_t>(t + i) * rows.count + first,
             each + i * kLanes, some * sizeof(float));
    }
  }
}

template <Format format>
void dot_float(const Rows& rows, const Tokens<float>& tokens, float* sums,
               uint8_t* scratch) {
  constexpr int kTokens = 4;
  int t = 0;
  for (; t + kTokens <= tokens.count; t += kTokens)
    float_tokens<format, kTokens>(rows, tokens, t, sums, scratch);
  for (; t < tokens.count; ++t)
    float_tokens<format, 1>(rows, tokens, t, sums, scratch);
}

}  // namespace
}  // namespace tritera
