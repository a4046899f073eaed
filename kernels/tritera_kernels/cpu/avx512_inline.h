// SPDX-License-Identifier: Apache-2.0
// AVX-512 VNNI kernels, for the files that are compiled with its flags.
//
// Shapes: R rows, T tokens, in registers.
#pragma once

#include <immintrin.h>

#include "kernel.h"

namespace tritera {

// base_three looks its digits up with AVX-512 VBMI: a file of its own.
void avx512_vbmi_dot_int8(const Rows&, const Tokens<int8_t>&, int32_t* sums,
                          uint8_t* scratch);
void avx512_vbmi_dot_float(const Rows&, const Tokens<float>&, float* sums,
                           uint8_t* scratch);

namespace {

#define TRITERA_INLINE inline __attribute__((always_inline))

// How far ahead a row is fetched: into the second cache, then the first. The
// distances are those that read fastest here, of 0 to 32 KiB.
constexpr size_t kFar = 8192, kNear = 1024;

TRITERA_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p) + kFar, _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p) + kNear, _MM_HINT_T0);
}

TRITERA_INLINE __mmask64 first_bytes(size_t n) {
  return n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

// The digits of a base_three byte: the first four as two_bit has them, and
// the fifth.
struct Trits {
  alignas(64) uint8_t four[256];
  alignas(64) uint8_t fifth[256];
};

constexpr Trits make_trits() {
  Trits trits{};
  for (int byte = 0; byte < 256; ++byte) {
    unsigned rest = byte;
    for (int plane = 0; plane < 5; ++plane) {
      rest *= 3;
      if (plane < 4)
        trits.four[byte] |= rest >> 8 << (2 * plane);
      else
        trits.fifth[byte] = rest >> 8;
      rest &= 0xff;
    }
  }
  return trits;
}

constexpr Trits kTrits = make_trits();

#if defined(__AVX512VBMI__)
struct Table {
  __m512i part[4];

  explicit TRITERA_INLINE Table(const uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) part[i] = _mm512_load_si512(bytes + 64 * i);
  }

  // Two look-ups of 128 entries; the second leaves what the first has done.
  TRITERA_INLINE __m512i operator()(__m512i v) const {
    const __mmask64 high = _mm512_movepi8_mask(v);
    const __m512i low =
        _mm512_mask2_permutex2var_epi8(part[0], v, ~high, part[1]);
    return _mm512_mask2_permutex2var_epi8(part[2], low, high, part[3]);
  }
};
#endif

TRITERA_INLINE __m512i dot(__m512i sum, __m512i digits, __m512i x) {
  // Not the intrinsic: gcc 12 copies the sums of a large tile to the stack and
  // back around it.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(digits), "v"(x));
  return sum;
}

// Lane i of the result: the sum of the lanes of s[i].
TRITERA_INLINE __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b),
                                      _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d),
                                      _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd),
                                        _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd),
                                        _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half),
                       _mm256_extracti128_si256(half, 1));
}

// One token, one row. A two_bit digit is left where it is in its byte: each
// plane has its own sum, 4^plane too large.
template <Format format>
TRITERA_INLINE __m512i one_row(const uint8_t* row, size_t bytes,
                               const int8_t* x, size_t plane) {
  const __m512i m0 = _mm512_set1_epi8(3), m1 = _mm512_set1_epi8(12);
  const __m512i m2 = _mm512_set1_epi8(48), m3 = _mm512_set1_epi8(-64);
  __m512i sum[4] = {};
#if defined(__AVX512VBMI__)
  const Table four(kTrits.four), fifth(kTrits.fifth);
#endif
  for (size_t p = 0; p < bytes; p += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(row) + p + kFar, _MM_HINT_T1);
    const __m512i v =
        _mm512_maskz_loadu_epi8(first_bytes(bytes - p), row + p);
    const auto x_of = [&](int i) __attribute__((always_inline)) {
      return _mm512_load_si512(x + i * plane + p);
    };
    if constexpr (format == kByte) {
      sum[0] = dot(sum[0], v, x_of(0));
    } else if constexpr (format == kTwoBit) {
      sum[0] = dot(sum[0], _mm512_and_si512(v, m0), x_of(0));
      sum[1] = dot(sum[1], _mm512_and_si512(v, m1), x_of(1));
      sum[2] = dot(sum[2], _mm512_and_si512(v, m2), x_of(2));
      sum[3] = dot(sum[3], _mm512_and_si512(v, m3), x_of(3));
    } else {
#if defined(__AVX512VBMI__)
      const __m512i low = four(v);
      sum[0] = dot(sum[0], _mm512_and_si512(low, m0), x_of(0));
      sum[1] = dot(sum[1], _mm512_and_si512(low, m1), x_of(1));
      sum[2] = dot(sum[2], _mm512_and_si512(low, m2), x_of(2));
      sum[3] = dot(sum[3], _mm512_and_si512(low, m3), x_of(3));
      sum[0] = dot(sum[0], fifth(v), x_of(4));
#endif
    }
  }
  if constexpr (format == kByte) return sum[0];
  return _mm512_add_epi32(
      _mm512_add_epi32(sum[0], _mm512_srai_epi32(sum[1], 2)),
      _mm512_add_epi32(_mm512_srai_epi32(sum[2], 4),
                       _mm512_srai_epi32(sum[3], 6)));
}

// One token, four rows, one after another: a thread reads one stream, which
// the processor fetches by itself. Side by side, they depend on software to be
// fetched, and take up to twice as long when memory answers slowly.
template <Format format>
TRITERA_INLINE __m128i four_rows(const uint8_t* const row[4], size_t bytes,
                                 const int8_t* x, size_t plane) {
  __m512i sum[4];
  for (int r = 0; r < 4; ++r) sum[r] = one_row<format>(row[r], bytes, x, plane);
  return sum_lanes(sum[0], sum[1], sum[2], sum[3]);
}

// T tokens by four rows, for so few tokens that a row's digits are taken apart
// in registers and not stored: T * 4 sums, and the rows, have to fit.
template <Format format, int T>
TRITERA_INLINE void few_tokens(const uint8_t* const row[4], size_t bytes,
                               const int8_t* x, size_t plane, size_t token,
                               int32_t* sums, int row_count, __mmask8 wanted) {
  const __m512i three = _mm512_set1_epi8(3);
  __m512i sum[T][4] = {};
  const auto add = [&](const __m512i digits[4], const int8_t* at)
                       __attribute__((always_inline)) {
#pragma GCC unroll 5
    for (int t = 0; t < T; ++t) {
      const __m512i v = _mm512_load_si512(at + t * token);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[t][r] = dot(sum[t][r], digits[r], v);
    }
  };
  for (size_t p = 0; p < bytes; p += 64) {
    const __mmask64 in = first_bytes(bytes - p);
    __m512i v[4], digits[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      prefetch(row[r] + p);
      v[r] = _mm512_maskz_loadu_epi8(in, row[r] + p);
    }
    if constexpr (format == kByte) {
      add(v, x + p);
      continue;
    }
#if defined(__AVX512VBMI__)
    if constexpr (format == kBaseThree) {
      const Table four(kTrits.four), fifth(kTrits.fifth);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        digits[r] = fifth(v[r]);
        v[r] = four(v[r]);
      }
      add(digits, x + 4 * plane + p);
    }
#endif
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        digits[r] = _mm512_and_si512(v[r], three);
        v[r] = _mm512_srli_epi16(v[r], 2);
      }
      add(digits, x + i * plane + p);
    }
  }
#pragma GCC unroll 5
  for (int t = 0; t < T; ++t) {
    _mm_mask_storeu_epi32(
        sums + t * row_count, wanted,
        sum_lanes(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
  }
}

// The digits of one row as `Planes` lays a segment out.
template <Format format>
TRITERA_INLINE void decode_row(const uint8_t* row, size_t bytes, size_t plane,
                               uint8_t* out) {
  const __m512i three = _mm512_set1_epi8(3);
  for (size_t p = 0; p < bytes; p += 64) {
    prefetch(row + p);
    const __m512i v =
        _mm512_maskz_loadu_epi8(first_bytes(bytes - p), row + p);
    __m512i digits = v;
    if constexpr (format == kByte) {
      _mm512_store_si512(out + p, v);
      continue;
    }
#if defined(__AVX512VBMI__)
    if constexpr (format == kBaseThree) {
      const Table four(kTrits.four), fifth(kTrits.fifth);
      digits = four(v);
      _mm512_store_si512(out + 4 * plane + p, fifth(v));
    }
#endif
    _mm512_store_si512(out + p, _mm512_and_si512(digits, three));
    for (int i = 1; i < 4; ++i) {
      digits = _mm512_srli_epi16(digits, 2);
      _mm512_store_si512(out + i * plane + p, _mm512_and_si512(digits, three));
    }
  }
}

// T tokens by four decoded rows of `length` digits, `stride` apart.
template <int T>
TRITERA_INLINE void tile(const uint8_t* digits, size_t length, size_t stride,
                         const int8_t* x, size_t token, int32_t* sums,
                         int row_count, int rows) {
  __m512i sum[T][4] = {};
  for (size_t k = 0; k < length; k += 64) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      w[r] = _mm512_load_si512(digits + r * stride + k);
#pragma GCC unroll 6
    for (int t = 0; t < T; ++t) {
      const __m512i v = _mm512_load_si512(x + t * token + k);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sum[t][r] = dot(sum[t][r], w[r], v);
    }
  }
  const __mmask8 wanted = static_cast<__mmask8>((1 << rows) - 1);
#pragma GCC unroll 6
  for (int t = 0; t < T; ++t) {
    _mm_mask_storeu_epi32(
        sums + t * row_count, wanted,
        sum_lanes(sum[t][0], sum[t][1], sum[t][2], sum[t][3]));
  }
}

// Up to so many tokens a row is taken apart anew for each tile of them, up to
// kFewTile at once; past it, once for all.
constexpr int kFewTokens = 12;
constexpr int kFewTile = 4;
constexpr int kTileTokens = 6;

template <Format format>
TRITERA_INLINE void dot_int8_all(const Rows& rows,
                                 const Tokens<int8_t>& tokens, int32_t* sums,
                                 uint8_t* scratch) {
  const int last = rows.count - 1;
  if (tokens.count <= kFewTokens) {
    for (int r = 0; r < rows.count; r += 4) {
      const uint8_t* row[4];
      for (int i = 0; i < 4; ++i) {
        const int at = r + i < last ? r + i : last;
        row[i] = rows.data + at * rows.stride;
      }
      const int left = rows.count - r < 4 ? rows.count - r : 4;
      const __mmask8 wanted = static_cast<__mmask8>((1 << left) - 1);
      int tiles = (tokens.count + kFewTile - 1) / kFewTile;
      for (int t = 0; t < tokens.count; --tiles) {
        const int T = (tokens.count - t + tiles - 1) / tiles;
        const int8_t* x = tokens.x + t * tokens.token;
        int32_t* out = sums + t * rows.count + r;
        switch (T) {
          case 1:
            _mm_mask_storeu_epi32(
                out, wanted, four_rows<format>(row, rows.bytes, x, tokens.plane));
            break;
          case 2:
            few_tokens<format, 2>(row, rows.bytes, x, tokens.plane,
                                  tokens.token, out, rows.count, wanted);
            break;
          case 3:
            few_tokens<format, 3>(row, rows.bytes, x, tokens.plane,
                                  tokens.token, out, rows.count, wanted);
            break;
          default:
            few_tokens<format, 4>(row, rows.bytes, x, tokens.plane,
                                  tokens.token, out, rows.count, wanted);
        }
        t += T;
      }
    }
    return;
  }
  constexpr int planes = kDigitsPerByte[format];
  const size_t length = planes * tokens.plane;
  const size_t stride = length + 64;  // as Planes::token
  for (int r = 0; r < rows.count; ++r) {
    decode_row<format>(rows.data + r * rows.stride, rows.bytes, tokens.plane,
                       scratch + r * stride);
  }
  // The tokens of a tile stay in the first cache while the rows pass by. Tiles
  // are equal but for one token: 8 are 4 and 4, not 6 and 2.
  int tiles = (tokens.count + kTileTokens - 1) / kTileTokens;
  for (int t = 0; t < tokens.count; --tiles) {
    const int T = (tokens.count - t + tiles - 1) / tiles;
    const int8_t* x = tokens.x + t * tokens.token;
    for (int r = 0; r < rows.count; r += 4) {
      const uint8_t* digits = scratch + r * stride;
      int32_t* out = sums + t * rows.count + r;
      const int left = rows.count - r < 4 ? rows.count - r : 4;
      switch (T) {
        case 4:
          tile<4>(digits, length, stride, x, tokens.token, out, rows.count,
                  left);
          break;
        case 5:
          tile<5>(digits, length, stride, x, tokens.token, out, rows.count,
                  left);
          break;
        default:
          tile<6>(digits, length, stride, x, tokens.token, out, rows.count,
                  left);
      }
    }
    t += T;
  }
}

// 16 x 16 transposition of 32-bit lanes.
TRITERA_INLINE void transpose(__m512i v[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // v[4 a + c]: lane 4 l + r is row 4 a + r, column 4 l + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low, low2, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Float activations. Lanes are 16 rows; four bits of a row, two codes, choose
// among the sums that two inputs can give, so one permutation and one addition
// do 32 codes. Packed bytes come transposed: 4 bytes of 16 rows a vector.
constexpr int kGroups = 4;                // of 16 rows
constexpr int kFloatRows = 16 * kGroups;  // at once
constexpr size_t kColumns = 256;          // bytes that a row is fetched ahead

// Vectors of 4 bytes and 64 rows; base_three's fifth digits follow each.
template <Format format>
constexpr int kQuadVectors = kGroups * (format == kBaseThree ? 2 : 1);

template <Format format>
TRITERA_INLINE void transpose_rows(const Rows& rows, int first,
                                   __m512i* quads) {
  const int last = rows.count - 1;
  constexpr int step = kQuadVectors<format>;
  for (size_t p = 0; p < rows.bytes; p += 64) {
    const __mmask64 in = first_bytes(rows.bytes - p);
    const int count = static_cast<int>(
        rows.bytes - p < 64 ? (rows.bytes - p + 3) / 4 : 16);
    // The rows are read side by side: what comes is further along them, and
    // then in the next 64.
    const size_t ahead = p + kColumns < rows.bytes
                             ? p + kColumns
                             : p + kColumns - rows.bytes +
                                   kFloatRows * rows.stride;
    for (int g = 0; g < kGroups; ++g) {
      __m512i v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int r = first + 16 * g + i;
        const uint8_t* row = rows.data + (r < last ? r : last) * rows.stride;
        _mm_prefetch(reinterpret_cast<const char*>(row) + ahead, _MM_HINT_T0);
        v[i] = _mm512_maskz_loadu_epi8(in, row + p);
      }
      __m512i* out = quads + p / 4 * step + g;
#if defined(__AVX512VBMI__)
      if constexpr (format == kBaseThree) {
        const Table four(kTrits.four), fifth(kTrits.fifth);
        __m512i last_digit[16];
        for (int i = 0; i < 16; ++i) {
          const __m512i digit = fifth(v[i]);
          // Two neighbours' digits become four bits of a 16-bit lane.
          last_digit[i] =
              _mm512_or_si512(digit, _mm512_srli_epi16(digit, 6));
          v[i] = four(v[i]);
        }
        transpose(last_digit);
        for (int i = 0; i < count; ++i) out[i * step + kGroups] = last_digit[i];
      }
#endif
      transpose(v);
      for (int i = 0; i < count; ++i) out[i * step] = v[i];
    }
  }
}

// Sums that a pair of inputs can give, by the four bits of their digits.
TRITERA_INLINE __m512 pair_sums(float a, float b) {
  const __m512 low = _mm512_setr_ps(-1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1,
                                    0, 1, 0);
  const __m512 high =
      _mm512_setr_ps(-1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_fmadd_ps(_mm512_set1_ps(a), low,
                         _mm512_mul_ps(_mm512_set1_ps(b), high));
}

// One token by 64 rows.
//
// Rounding, in units u = eps / 2 of sum |code x|: a pair 1, a chain of at most
// 5 pairs 4 more, two chains 1, then double precision; the result and its
// scale 2. In all at most 8 u = 4 eps.
//
// Meanwhile the 64 rows after these, from `next` on, come from memory.
template <Format format>
TRITERA_INLINE void float_rows(const __m512i* quads, size_t bytes,
                               const float* x, size_t plane,
                               const uint8_t* next, float* sums) {
  constexpr int step = kQuadVectors<format>;
  __m512d total[kGroups][2] = {};
  for (size_t p = 0; p < bytes; p += 4, quads += step) {
    for (int line = 0; line < 4 * kFloatRows; line += 64) {
      _mm_prefetch(
          reinterpret_cast<const char*>(next) + p * kFloatRows + line,
          _MM_HINT_T1);
    }
    __m512i index[kGroups];
    __m512 chain[2][kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) index[g] = quads[g];
    // Half a quad: two bytes, a chain.
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
      for (int byte = 0; byte < 2; ++byte) {
        const size_t at = p + 2 * half + byte;
#pragma GCC unroll 2
        for (int pair = 0; pair < 2; ++pair) {
          const __m512 choice =
              pair_sums(x[2 * pair * plane + at], x[(2 * pair + 1) * plane + at]);
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g) {
            const __m512 value = _mm512_permutexvar_ps(index[g], choice);
            chain[half][g] = byte == 0 && pair == 0
                                 ? value
                                 : _mm512_add_ps(chain[half][g], value);
            index[g] = _mm512_srli_epi32(index[g], 4);
          }
        }
      }
      if constexpr (format == kBaseThree) {
        const size_t at = p + 2 * half;
        const __m512 choice =
            pair_sums(x[4 * plane + at], x[4 * plane + at + 1]);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          __m512i fifth = quads[kGroups + g];
          if (half) fifth = _mm512_srli_epi32(fifth, 16);
          chain[half][g] = _mm512_add_ps(
              chain[half][g], _mm512_permutexvar_ps(fifth, choice));
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const __m512 sum = _mm512_add_ps(chain[0][g], chain[1][g]);
      total[g][0] = _mm512_add_pd(
          total[g][0], _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
      total[g][1] = _mm512_add_pd(
          total[g][1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    _mm256_store_ps(sums + 16 * g, _mm512_cvtpd_ps(total[g][0]));
    _mm256_store_ps(sums + 16 * g + 8, _mm512_cvtpd_ps(total[g][1]));
  }
}

template <Format format>
TRITERA_INLINE void dot_float_all(const Rows& rows,
                                  const Tokens<float>& tokens, float* sums,
                                  uint8_t* scratch) {
  __m512i* quads = reinterpret_cast<__m512i*>(scratch);
  alignas(64) float block[kFloatRows];
  for (int first = 0; first < rows.count; first += kFloatRows) {
    transpose_rows<format>(rows, first, quads);
    const int count = rows.count - first < kFloatRows ? rows.count - first
                                                      : kFloatRows;
    for (int t = 0; t < tokens.count; ++t) {
      float_rows<format>(quads, rows.bytes, tokens.x + t * tokens.token,
                         tokens.plane,
                         rows.data + (first + kFloatRows) * rows.stride, block);
      float* out = sums + t * rows.count + first;
      for (int r = 0; r < count; ++r) out[r] = block[r];
    }
  }
}

}  // namespace
}  // namespace tritera
