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

// Reads `streams` equal parts side by side, each fetched so far ahead into the
// second cache and the first (0: not).
template <size_t streams, size_t far, size_t near>
uint64_t read(const char* data, size_t bytes) {
  const size_t stream = bytes / streams / kLine * kLine;
  uint64_t sum[8] = {};
  for (size_t at = 0; at < stream; at += kLine) {
    for (size_t s = 0; s < streams; ++s) {
      const char* line = data + s * stream + at;
      if (far) __builtin_prefetch(line + far, 0, 2);
      __builtin_prefetch(line + near, 0, 3);
      uint64_t words[8];
      memcpy(words, line, kLine);
      for (int i = 0; i < 8; ++i) sum[i] += words[i];
    }
  }
  return sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
}

// Which is fastest differs between processors.
constexpr uint64_t (*kReaders[])(const char*, size_t) = {
    read<1, 0, 4096>, read<4, 4096, 1024>, read<16, 4096, 1024>};

}  // namespace
}  // namespace tritera

extern "C" {

// Seconds of each of `passes` readings of `bytes` by `threads` threads, from
// pages of 2 MiB if `huge` (and the system has them), else of the usual size;
// of the way of reading that is fastest here. False: there is no such memory.
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
  std::vector<std::vector<double>> times;
  for (const auto reader : kReaders) {
    std::vector<double>& own = times.emplace_back();
    auto part = [&](int i) {
      sums[i] += reader(data + bytes / threads * i, bytes / threads);
    };
    for (int pass = 0; pass < passes; ++pass) {
      const auto start = Clock::now();
      std::vector<std::thread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back(part, i);
      part(0);
      for (std::thread& thread : others) thread.join();
      own.push_back(
          std::chrono::duration<double>(Clock::now() - start).count());
    }
    std::sort(own.begin(), own.end());
  }
  const auto fastest = std::min_element(
      times.begin(), times.end(), [&](const auto& a, const auto& b) {
        return a[passes / 2] < b[passes / 2];
      });
  std::copy(fastest->begin(), fastest->end(), seconds);
  volatile uint64_t used = 0;
  for (const uint64_t sum : sums) used = used ^ sum;
  munmap(memory, reserved);
  return true;
}
}
