// SPDX-License-Identifier: Apache-2.0
// clang-format off: the vectors come first.
#if defined(__aarch64__)
#include "simd_neon.h"
#include "ops_inline.h"

namespace tritera {
const Ops* neon_ops() { return &kOps; }
}  // namespace tritera
#else
#include "ops.h"

namespace tritera {
const Ops* neon_ops() { return nullptr; }
}  // namespace tritera
#endif
