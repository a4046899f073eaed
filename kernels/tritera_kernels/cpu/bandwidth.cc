// SPDX-License-Identifier: Apache-2.0
// How fast this machine reads memory: the limit of one token's matmuls.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

namespace tritera {
namespace {

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kLine = 64;
// Streams of a thread, and how far ahead each is fetched: as the kernels do.
constexpr size_t kStreams = 4, kFar = 16384, kNear = 1024;

uint64_t read(const char* data, size_t bytes) {
  const size_t stream = bytes / kStreams / kLine * kLine;
  uint64_t sum[8] = {};
  for (size_t at = 0; at < stream; at += kLine) {
    for (size_t s = 0; s < kStreams; ++s) {
      const char* line = data + s * stream + at;
      __builtin_prefetch(line + kFar, 0, 2);
      __builtin_prefetch(line + kNear, 0, 3);
      uint64_t words[8];
      memcpy(words, line, kLine);
      for (int i = 0; i < 8; ++i) sum[i] += words[i];
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

}  // namespace
}  // namespace tritera

extern "C" {

// Seconds of each of `passes` readings of `bytes` by `threads` threads, from
// pages of 2 MiB if `huge` (and the system has them), else of the usual size.
// False if there is no memory for it.
__attribute__((visibility("default"))) bool tritera_read_seconds(
    size_t bytes, int threads, bool huge, int passes, double* seconds) {
  using namespace tritera;
  using Clock = std::chrono::steady_clock;
  const size_t reserved = bytes + 2 * kHugePage;
  void* memory = mmap(nullptr, reserved, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return false;
  char* data = reinterpret_cast<char*>(
      (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage *
      kHugePage);
#if defined(MADV_HUGEPAGE)
  madvise(data, bytes, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  memset(data, 1, bytes);
  std::vector<uint64_t> sums(threads);
  for (int pass = 0; pass < passes; ++pass) {
    const auto start = Clock::now();
    std::vector<std::thread> others;
    auto part = [&](int i) {
      sums[i] += read(data + bytes / threads * i, bytes / threads);
    };
    for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
    part(0);
    for (std::thread& thread : others) thread.join();
    seconds[pass] =
        std::chrono::duration<double>(Clock::now() - start).count();
  }
  volatile uint64_t used = 0;
  for (const uint64_t sum : sums) used = used ^ sum;
  munmap(memory, reserved);
  return true;
}
}
