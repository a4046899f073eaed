// SPDX-License-Identifier: Apache-2.0
// Dots by NEON with dotprod, and with i8mm where the flags of the file that
// includes this have it.
#pragma once

#include <arm_neon.h>
#include <string.h>

#include "kernel.h"

namespace tritera {
namespace {

constexpr size_t kStep = 16;  // bytes of a vector
constexpr int kRows = 4;      // rows that share a load of the inputs
constexpr int kTokens = 4;    // tokens that share a load of four rows
// Bytes of a row that are unpacked at a time, so that they stay in the cache.
constexpr size_t kChunk = 1024;

// The last `count` < 16 bytes before `end`, then zeros: digits that are 0.
inline uint8x16_t load_tail(const uint8_t* end, size_t count) {
  uint8_t copy[kStep] = {};
  memcpy(copy, end - count, count);
  return vld1q_u8(copy);
}

inline uint8x16_t load_row(const uint8_t* row, size_t left) {
  return left < kStep ? load_tail(row + left, left) : vld1q_u8(row);
}

inline void prefetch(const uint8_t* p) {
  __builtin_prefetch(p + 1024, 0, 3);
}

// What stands for a digit: the digit; minus the digit, since comparisons give
// -1; the digit - 128, since both sides of sdot are signed.
template <Format format>
inline void unpack(uint8x16_t v, int8x16_t* digits) {
  if (format == kTwoBit) {
    const uint8x16_t three = vdupq_n_u8(3);
    digits[0] = vreinterpretq_s8_u8(vandq_u8(v, three));
    digits[1] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 2), three));
    digits[2] = vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(v, 4), three));
    digits[3] = vreinterpretq_s8_u8(vshrq_n_u8(v, 6));
  } else if (format == kBaseThree) {
    for (int j = 0; j < 5; ++j) {
      digits[j] = vreinterpretq_s8_u8(vaddq_u8(
          vcgeq_u8(v, vdupq_n_u8(86)), vcgeq_u8(v, vdupq_n_u8(171))));
      v = vmulq_u8(v, vdupq_n_u8(3));
    }
  } else {
    digits[0] = vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
  }
}

// The sum over digits from that over what stands for them.
template <Format format>
inline int32x4_t whole(int32x4_t sums, int32_t x) {
  if (format == kTwoBit) return sums;
  if (format == kBaseThree) return vnegq_s32(sums);
  return vaddq_s32(sums, vdupq_n_s32(static_cast<int32_t>(128u * x)));
}

template <Format format>
inline int32_t sum_inputs(const int8_t* x, size_t size) {
  if (format != kByte) return 0;
  int32x4_t sum = vdupq_n_s32(0);
  for (size_t p = 0; p < size; p += kStep)
    sum = vdotq_s32(sum, vdupq_n_s8(1), vld1q_s8(x + p));
  return vaddvq_s32(sum);
}

inline int32x4_t reduce(const int32x4_t s[kRows]) {
  return vpaddq_s32(vpaddq_s32(s[0], s[1]), vpaddq_s32(s[2], s[3]));
}

inline void put(int32x4_t four, int count, bool add, int32_t* sums) {
  int32_t each[kRows];
  vst1q_s32(each, four);
  for (int r = 0; r < count && r < kRows; ++r)
    sums[r] = each[r] + (add ? sums[r] : 0);
}

// Four rows from `first` on, as if there were enough of them.
struct Pointers {
  const uint8_t* row[kRows];
  Pointers(const Rows& rows, int first) {
    for (int r = 0; r < kRows; ++r) {
      const int at = first + r < rows.count ? first + r : rows.count - 1;
      row[r] = rows.data + at * rows.stride;
    }
  }
};

template <Format format>
void dot_one(const Rows& rows, const Tokens<int8_t>& tokens, int32_t* sums) {
  constexpr int kPlanes = kDigitsPerByte[format];
  const int32_t x_sum = sum_inputs<format>(tokens.x, rows.bytes);
  for (int first = 0; first < rows.count; first += kRows) {
    const Pointers at(rows, first);
    // Two sums a row: sdot takes longer than the others need in between.
    int32x4_t even[kRows], odd[kRows];
    for (int r = 0; r < kRows; ++r) even[r] = odd[r] = vdupq_n_s32(0);
    for (size_t p = 0; p < rows.bytes; p += kStep) {
      int8x16_t x[kPlanes];
      for (int j = 0; j < kPlanes; ++j)
        x[j] = vld1q_s8(tokens.x + j * tokens.plane + p);
      for (int r = 0; r < kRows; ++r) {
        if (p % 64 == 0) prefetch(at.row[r] + p);
        int8x16_t digits[kPlanes];
        unpack<format>(load_row(at.row[r] + p, rows.bytes - p), digits);
        for (int j = 0; j < kPlanes; ++j) {
          int32x4_t& sum = (j % 2 ? odd : even)[r];
          sum = vdotq_s32(sum, digits[j], x[j]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) even[r] = vaddq_s32(even[r], odd[r]);
    put(whole<format>(reduce(even), x_sum), rows.count - first, false,
        sums + first);
  }
}

// A chunk of four rows as [plane][vector][row]; with i8mm, pairs of rows
// alternate every 8 bytes.
template <Format format>
void unpack_chunk(const Pointers& at, size_t from, size_t size, int8_t* out) {
  constexpr int kPlanes = kDigitsPerByte[format];
  const size_t steps = (size + kStep - 1) / kStep;
  for (size_t s = 0; s < steps; ++s) {
    int8x16_t digits[kRows][kPlanes];
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* row = at.row[r] + from + s * kStep;
      unpack<format>(load_row(row, size - s * kStep), digits[r]);
    }
    for (int j = 0; j < kPlanes; ++j) {
      int8_t* to = out + (j * steps + s) * kRows * kStep;
      for (int r = 0; r < kRows; r += 2) {
        const int8x16_t a = digits[r][j], b = digits[r + 1][j];
#if defined(__ARM_FEATURE_MATMUL_INT8)
        const int64x2_t c = vreinterpretq_s64_s8(a);
        const int64x2_t d = vreinterpretq_s64_s8(b);
        vst1q_s8(to + r * kStep, vreinterpretq_s8_s64(vzip1q_s64(c, d)));
        vst1q_s8(to + (r + 1) * kStep, vreinterpretq_s8_s64(vzip2q_s64(c, d)));
#else
        vst1q_s8(to + r * kStep, a);
        vst1q_s8(to + (r + 1) * kStep, b);
#endif
      }
    }
  }
}

// Four unpacked rows and `count` tokens, an even number.
template <int planes, int count>
void dot_tile(const int8_t* digits, size_t steps, const int8_t* const* x,
              size_t plane, int32x4_t* sums) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  // [pair of tokens][pair of rows] of (token, row) 00, 01, 10, 11.
  int32x4_t part[count / 2][2];
  for (int t = 0; t < count / 2; ++t)
    part[t][0] = part[t][1] = vdupq_n_s32(0);
  for (int j = 0; j < planes; ++j) {
    for (size_t s = 0; s < steps; ++s, digits += kRows * kStep) {
      int8x16_t w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = vld1q_s8(digits + r * kStep);
      for (int t = 0; t < count / 2; ++t) {
        const size_t p = j * plane + s * kStep;
        const int64x2_t a = vreinterpretq_s64_s8(vld1q_s8(x[2 * t] + p));
        const int64x2_t b = vreinterpretq_s64_s8(vld1q_s8(x[2 * t + 1] + p));
        const int8x16_t low = vreinterpretq_s8_s64(vzip1q_s64(a, b));
        const int8x16_t high = vreinterpretq_s8_s64(vzip2q_s64(a, b));
        for (int r = 0; r < 2; ++r) {
          part[t][r] = vmmlaq_s32(part[t][r], low, w[2 * r]);
          part[t][r] = vmmlaq_s32(part[t][r], high, w[2 * r + 1]);
        }
      }
    }
  }
  for (int t = 0; t < count / 2; ++t) {
    sums[2 * t] = vcombine_s32(vget_low_s32(part[t][0]),
                               vget_low_s32(part[t][1]));
    sums[2 * t + 1] = vcombine_s32(vget_high_s32(part[t][0]),
                                   vget_high_s32(part[t][1]));
  }
#else
  int32x4_t part[count][kRows];
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < kRows; ++r) part[t][r] = vdupq_n_s32(0);
  for (int j = 0; j < planes; ++j) {
    for (size_t s = 0; s < steps; ++s, digits += kRows * kStep) {
      int8x16_t w[kRows];
      for (int r = 0; r < kRows; ++r) w[r] = vld1q_s8(digits + r * kStep);
      for (int t = 0; t < count; ++t) {
        const int8x16_t in = vld1q_s8(x[t] + j * plane + s * kStep);
        for (int r = 0; r < kRows; ++r)
          part[t][r] = vdotq_s32(part[t][r], w[r], in);
      }
    }
  }
  for (int t = 0; t < count; ++t) sums[t] = reduce(part[t]);
#endif
}

template <Format format>
void dot_many(const Rows& rows, const Tokens<int8_t>& tokens, int32_t* sums,
              uint8_t* scratch) {
  constexpr int kPlanes = kDigitsPerByte[format];
  int8_t* digits = reinterpret_cast<int8_t*>(scratch);
  for (int first = 0; first < rows.count; first += kRows) {
    const Pointers at(rows, first);
    for (size_t from = 0; from < rows.bytes; from += kChunk) {
      const size_t left = rows.bytes - from;
      const size_t size = left < kChunk ? left : kChunk;
      const size_t steps = (size + kStep - 1) / kStep;
      unpack_chunk<format>(at, from, size, digits);
      for (int t = 0; t < tokens.count; t += kTokens) {
        const int8_t* x[kTokens];
        for (int i = 0; i < kTokens; ++i) {
          const int token = t + i < tokens.count ? t + i : tokens.count - 1;
          x[i] = tokens.x + token * tokens.token + from;
        }
        const int some = tokens.count - t < kTokens ? tokens.count - t
                                                    : kTokens;
        int32x4_t four[kTokens];
        (some > 2 ? dot_tile<kPlanes, 4> : dot_tile<kPlanes, 2>)(
            digits, steps, x, tokens.plane, four);
        for (int i = 0; i < some; ++i) {
          put(whole<format>(four[i], sum_inputs<format>(x[i], size)),
              rows.count - first, from > 0,
              sums + static_cast<size_t>(t + i) * rows.count + first);
        }
      }
    }
  }
}

template <Format format>
void dot_int8(const Rows& rows, const Tokens<int8_t>& tokens, int32_t* sums,
              uint8_t* scratch) {
  if (tokens.count == 1)
    dot_one<format>(rows, tokens, sums);
  else
    dot_many<format>(rows, tokens, sums, scratch);
}

// One row and `count` tokens.
//
// A product is exact. Those of the planes are added in a chain and the four
// vectors of a plane in a tree, at most 6 roundings of float32 on the way of a
// product; then come doubles, and 1 rounding at the end: 7 / 2 eps of
// sum |code * x|.
template <Format format, int count>
void float_tile(const uint8_t* row, size_t bytes, const float* x, size_t plane,
                size_t token, float* sums) {
  constexpr int kPlanes = kDigitsPerByte[format];
  float64x2_t total[count];
  for (int t = 0; t < count; ++t) total[t] = vdupq_n_f64(0);
  for (size_t p = 0; p < bytes; p += kStep) {
    int8x16_t digits[kPlanes];
    unpack<format>(load_row(row + p, bytes - p), digits);
    float32x4_t part[count][4];
    for (int j = 0; j < kPlanes; ++j) {
      // ~-d is d - 1.
      const int8x16_t codes = format == kTwoBit
                                  ? vsubq_s8(digits[j], vdupq_n_s8(1))
                                  : vmvnq_s8(digits[j]);
      const int16x8_t low = vmovl_s8(vget_low_s8(codes));
      const int16x8_t high = vmovl_high_s8(codes);
      const float32x4_t code[4] = {
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
          vcvtq_f32_s32(vmovl_high_s16(low)),
          vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
          vcvtq_f32_s32(vmovl_high_s16(high)),
      };
      for (int t = 0; t < count; ++t) {
        for (int i = 0; i < 4; ++i) {
          const float32x4_t in =
              vld1q_f32(x + t * token + j * plane + p + 4 * i);
          part[t][i] = j == 0 ? vmulq_f32(code[i], in)
                              : vfmaq_f32(part[t][i], code[i], in);
        }
      }
    }
    for (int t = 0; t < count; ++t) {
      const float32x4_t sum = vaddq_f32(vaddq_f32(part[t][0], part[t][1]),
                                        vaddq_f32(part[t][2], part[t][3]));
      total[t] = vaddq_f64(total[t], vcvt_f64_f32(vget_low_f32(sum)));
      total[t] = vaddq_f64(total[t], vcvt_high_f64_f32(sum));
    }
  }
  for (int t = 0; t < count; ++t)
    sums[t] = static_cast<float>(vaddvq_f64(total[t]));
}

template <Format format>
void dot_float(const Rows& rows, const Tokens<float>& tokens, float* sums,
               uint8_t* /*scratch*/) {
  for (int r = 0; r < rows.count; ++r) {
    const uint8_t* row = rows.data + r * rows.stride;
    for (int t = 0; t < tokens.count;) {
      const bool many = t + kTokens <= tokens.count;
      const int some = many ? kTokens : 1;
      float each[kTokens];
      (many ? float_tile<format, kTokens> : float_tile<format, 1>)(
          row, rows.bytes, tokens.x + t * tokens.token, tokens.plane,
          tokens.token, each);
      for (int i = 0; i < some; ++i, ++t)
        sums[static_cast<size_t>(t) * rows.count + r] = each[i];
    }
  }
}

}  // namespace
}  // namespace tritera
