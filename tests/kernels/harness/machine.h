// SPDX-License-Identifier: Apache-2.0
// The kernels that this machine can run; AMX where it is emulated, too.
#pragma once

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <vector>

#include "kernel.h"

namespace testing {

inline std::vector<const tritera::Kernel*> machine_kernels() {
  using namespace tritera;
  std::vector<const Kernel*> all = {portable_kernel()};
  const auto add = [&all](const Kernel* kernel) {
    if (kernel) all.push_back(kernel);
  };
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    add(avx2_kernel());
  if (__builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi")) {
    add(avx512_kernel());
    if (amx_allowed()) add(amx_kernel());
  }
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(neon_kernel());
  if (getauxval(AT_HWCAP2) & HWCAP2_I8MM) add(neon_i8mm_kernel());
#endif
  return all;
}

}  // namespace testing
