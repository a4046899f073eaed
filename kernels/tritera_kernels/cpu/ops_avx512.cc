// SPDX-License-Identifier: Apache-2.0
// clang-format off: the vectors come first.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "simd_avx512.h"
#include "ops_inline.h"

namespace tritera {
const Ops* avx512_ops() { return &kOps; }
}  // namespace tritera
#else
#include "ops.h"

namespace tritera {
const Ops* avx512_ops() { return nullptr; }
}  // namespace tritera
#endif
