// SPDX-License-Identifier: Apache-2.0
// Plain C++: any processor, and what the others are compared with.
#include "kernel.h"

#include "ops.h"

namespace tritera {
namespace {

template <Format format>
inline int digit(uint8_t byte, int plane) {
  if (format == kTwoBit) return byte >> (2 * plane) & 3;
  if (format == kByte) return byte;
  // The byte is a fraction of 256: each digit is the carry of times 3.
  unsigned rest = byte;
  for (int i = 0; i < plane; ++i) rest = rest * 3 & 0xff;
  return static_cast<int>(rest * 3 >> 8);
}

template <Format format>
void dot_int8(const Rows& rows, const Tokens<int8_t>& tokens, int32_t* sums,
              uint8_t* /*scratch*/) {
  for (int t = 0; t < tokens.count; ++t) {
    for (int r = 0; r < rows.count; ++r) {
      const uint8_t* row = rows.data + r * rows.stride;
      int32_t sum = 0;
      for (int plane = 0; plane < kDigitsPerByte[format]; ++plane) {
        const int8_t* x = tokens.x + t * tokens.token + plane * tokens.plane;
        for (size_t p = 0; p < rows.bytes; ++p)
          sum += digit<format>(row[p], plane) * x[p];
      }
      sums[t * rows.count + r] = sum;
    }
  }
}

template <Format format>
void dot_float(const Rows& rows, const Tokens<float>& tokens, float* sums,
               uint8_t* /*scratch*/) {
  for (int t = 0; t < tokens.count; ++t) {
    for (int r = 0; r < rows.count; ++r) {
      const uint8_t* row = rows.data + r * rows.stride;
      double sum = 0;
      for (int plane = 0; plane < kDigitsPerByte[format]; ++plane) {
        const float* x = tokens.x + t * tokens.token + plane * tokens.plane;
        for (size_t p = 0; p < rows.bytes; ++p)
          sum += (digit<format>(row[p], plane) - 1) * static_cast<double>(x[p]);
      }
      sums[t * rows.count + r] = static_cast<float>(sum);
    }
  }
}

}  // namespace

const Kernel* portable_kernel() {
  static const Kernel kernel = {
      "portable",
      {dot_int8<kTwoBit>, dot_int8<kBaseThree>, dot_int8<kByte>},
      {dot_float<kTwoBit>, dot_float<kBaseThree>},
      nullptr,
      {nullptr, nullptr, nullptr},
      0,
      portable_ops(),
  };
  return &kernel;
}

}  // namespace tritera
