// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <initializer_list>

#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace tritera {
namespace {

std::atomic<const Kernel*> active{nullptr};

// Null if this machine cannot run it.
const Kernel* supported(const char* name) {
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      avx2_kernel();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni") && avx512_kernel();
  const bool vbmi = __builtin_cpu_supports("avx512vbmi");
  static const Kernel without_vbmi = [&] {
    Kernel kernel = avx512 ? *avx512_kernel() : *portable_kernel();
    if (avx512) {
      kernel.dot_int8[kBaseThree] = avx2_kernel()->dot_int8[kBaseThree];
      kernel.dot_float[kBaseThree] = avx2_kernel()->dot_float[kBaseThree];
    }
    return kernel;
  }();
  if (!strcmp(name, "amx")) {
    return avx512 && vbmi && __builtin_cpu_supports("amx-int8") &&
                   amx_kernel() && amx_allowed()
               ? amx_kernel()
               : nullptr;
  }
  if (!strcmp(name, "avx512"))
    return !avx512 ? nullptr : vbmi ? avx512_kernel() : &without_vbmi;
  if (!strcmp(name, "avx2")) return avx2 ? avx2_kernel() : nullptr;
#elif defined(__linux__) && defined(__aarch64__)
  constexpr unsigned long kDot = 1 << 20, kI8mm = 1 << 13;  // as hwcap.h
  if (!(getauxval(AT_HWCAP) & kDot) && strcmp(name, "portable")) return nullptr;
  if (!strcmp(name, "neon_i8mm"))
    return getauxval(AT_HWCAP2) & kI8mm ? neon_i8mm_kernel() : nullptr;
#endif
  if (!strcmp(name, "neon")) return neon_kernel();
  if (!strcmp(name, "portable")) return portable_kernel();
  return nullptr;
}

const Kernel* best() {
  const char* wanted = getenv("TRITERA_CPU");
  if (wanted && *wanted) {
    // Python refuses a name that cannot be obeyed before it gets here.
    if (const Kernel* kernel = supported(wanted)) return kernel;
  }
  for (const char* name : {"amx", "avx512", "avx2", "neon_i8mm", "neon"}) {
    if (const Kernel* kernel = supported(name)) return kernel;
  }
  return portable_kernel();
}

}  // namespace

const Kernel& active_kernel() {
  const Kernel* kernel = active.load(std::memory_order_acquire);
  if (!kernel) {
    kernel = best();
    active.store(kernel, std::memory_order_release);
  }
  return *kernel;
}

bool select_kernel(const char* name) {
  const Kernel* kernel = supported(name);
  if (kernel) active.store(kernel, std::memory_order_release);
  return kernel;
}

}  // namespace tritera
