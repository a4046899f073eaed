// SPDX-License-Identifier: Apache-2.0
// NEON with dotprod and i8mm: matrices of 2 rows by 2 tokens.
#include "kernel.h"

#include "ops.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)
#include "neon_dots.h"

namespace tritera {

const Kernel* neon_i8mm_kernel() {
  static const Kernel kernel = {
      "neon_i8mm",
      {dot_int8<kTwoBit>, dot_int8<kBaseThree>, dot_int8<kByte>},
      {dot_float<kTwoBit>, dot_float<kBaseThree>},
      nullptr,
      {nullptr, nullptr, nullptr},
      0,
      neon_ops(),
  };
  return &kernel;
}

}  // namespace tritera

#else

namespace tritera {
const Kernel* neon_i8mm_kernel() { return nullptr; }
}  // namespace tritera

#endif
