// SPDX-License-Identifier: Apache-2.0
// clang-format off: the vectors come first.
#if defined(__AVX2__) && defined(__FMA__)
#include "simd_avx2.h"
#include "ops_inline.h"

namespace tritera {
const Ops* avx2_ops() { return &kOps; }
}  // namespace tritera
#else
#include "ops.h"

namespace tritera {
const Ops* avx2_ops() { return nullptr; }
}  // namespace tritera
#endif
