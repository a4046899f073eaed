// SPDX-License-Identifier: Apache-2.0
// clang-format off: the vectors come first.
#include "simd_portable.h"
#include "ops_inline.h"

namespace tritera {
const Ops* portable_ops() { return &kOps; }
}  // namespace tritera
