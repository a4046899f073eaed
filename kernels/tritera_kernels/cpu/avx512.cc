// SPDX-License-Identifier: Apache-2.0
// AVX-512 with VNNI: Intel since Cascade Lake, AMD since Zen 4.
#include "kernel.h"
#include "ops.h"

#if defined(__AVX512VNNI__)

#include "avx512_inline.h"

namespace tritera {
namespace {

template <Format format>
void dot_int8(const Rows& rows, const Tokens<int8_t>& tokens, int32_t* sums,
              uint8_t* scratch) {
  dot_int8_all<format>(rows, tokens, sums, scratch);
}

void dot_float(const Rows& rows, const Tokens<float>& tokens, float* sums,
               uint8_t* scratch) {
  dot_float_all<kTwoBit>(rows, tokens, sums, scratch);
}

}  // namespace

const Kernel* avx512_kernel() {
  static const Kernel kernel = {
      "avx512",
      {dot_int8<kTwoBit>, avx512_vbmi_dot_int8, dot_int8<kByte>},
      {dot_float, avx512_vbmi_dot_float},
      nullptr,
      {nullptr, nullptr, nullptr},
      0,
      avx512_ops(),
  };
  return &kernel;
}

}  // namespace tritera

#else

namespace tritera {
const Kernel* avx512_kernel() { return nullptr; }
}  // namespace tritera

#endif
