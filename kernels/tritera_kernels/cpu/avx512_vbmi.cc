// SPDX-License-Identifier: Apache-2.0
// base_three on AVX-512 with VBMI: Intel since Ice Lake, AMD since Zen 4.
#if defined(__AVX512VBMI__)

#include "avx512_inline.h"

namespace tritera {

void avx512_vbmi_dot_int8(const Rows& rows, const Tokens<int8_t>& tokens,
                          int32_t* sums, uint8_t* scratch) {
  dot_int8_all<kBaseThree>(rows, tokens, sums, scratch);
}

void avx512_vbmi_dot_float(const Rows& rows, const Tokens<float>& tokens,
                           float* sums, uint8_t* scratch) {
  dot_float_all<kBaseThree>(rows, tokens, sums, scratch);
}

}  // namespace tritera

#endif
