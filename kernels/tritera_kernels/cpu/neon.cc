// SPDX-License-Identifier: Apache-2.0
// NEON with dotprod (armv8.2-a).
#include "kernel.h"

#include "ops.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "neon_dots.h"

namespace tritera {

const Kernel* neon_kernel() {
  static const Kernel kernel = {
      "neon",
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
const Kernel* neon_kernel() { return nullptr; }
}  // namespace tritera

#endif
