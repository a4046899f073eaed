// SPDX-License-Identifier: Apache-2.0
// What the tests of `Ops` share: inputs, counts, and the tables to test.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"

namespace testing {

using tritera::Ops;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline std::vector<std::pair<std::string, const Ops*>> tables() {
  std::vector<std::pair<std::string, const Ops*>> found = {
      {"portable", tritera::portable_ops()}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    found.push_back({"avx2", tritera::avx2_ops()});
  if (__builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512vbmi"))
    found.push_back({"avx512", tritera::avx512_ops()});
#elif defined(__aarch64__)
  found.push_back({"neon", tritera::neon_ops()});
#endif
  return found;
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int integer(int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(engine_);
  }
  float normal() { return normal_(engine_); }
  std::vector<float> normals(size_t n, float scale = 1) {
    std::vector<float> x(n);
    for (float& value : x) value = normal() * scale;
    return x;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Checks and the greatest error by name.
class Tally {
 public:
  // `error` in units of what is allowed.
  void error(const std::string& name, double error, const char* what = "") {
    Count& count = counts_[name];
    ++count.checks;
    if (error > count.most || isnan(error)) count.most = error;
    if (error <= 1) return;
    if (++count.failed <= 5)
      printf("FAILED %s: %g of what is allowed; %s\n", name.c_str(), error,
             what);
  }
  void equal(const std::string& name, bool same, const char* what = "") {
    error(name, same ? 0 : kInf, what);
  }
  // Prints all; the number that failed.
  int report() const {
    int failed = 0;
    for (const auto& [name, count] : counts_) {
      printf("%-28s %9ld checks %6d failed, most %.3f of the allowed error\n",
             name.c_str(), count.checks, count.failed, count.most);
      failed += count.failed;
    }
    return failed;
  }

 private:
  struct Count {
    long checks = 0;
    int failed = 0;
    double most = 0;
  };
  std::map<std::string, Count> counts_;
};

// A heap block of just this size, so that the address sanitizer sees a read
// past its end; aligned to 64 bytes.
template <class T>
class Block {
 public:
  explicit Block(size_t n, T fill = T{}) : n_(n) {
    // Not aligned_alloc: the size need not be a multiple.
    if (posix_memalign(&data_, 64, std::max<size_t>(n * sizeof(T), 1))) abort();
    std::fill_n(get(), n, fill);
  }
  explicit Block(const std::vector<T>& from) : Block(from.size()) {
    std::copy(from.begin(), from.end(), get());
  }
  ~Block() { free(data_); }
  Block(Block&& from) : data_(from.data_), n_(from.n_) { from.data_ = nullptr; }
  Block& operator=(const Block&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  T& operator[](size_t i) const { return get()[i]; }
  size_t size() const { return n_; }

 private:
  void* data_ = nullptr;
  size_t n_;
};

inline bool same_bits(float a, float b) {
  if (isnan(a) || isnan(b)) return isnan(a) && isnan(b);
  return memcmp(&a, &b, 4) == 0;
}

inline float from_bfloat16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

struct Quantized {
  std::vector<int> q;
  float scale;
};

// As tritera_kernels.matmul.reference.quantize_activations.
inline Quantized quantized(const std::vector<float>& x) {
  int32_t most = 0;
  for (float value : x) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    most = std::max(most, bits & 0x7fffffff);
  }
  float absmax;
  memcpy(&absmax, &most, 4);
  Quantized out{std::vector<int>(x.size(), 0), 0};
  if (!isfinite(absmax)) {
    out.scale = kNan;
  } else if (!(absmax < 1e-30f)) {
    float factor = 127.0f / absmax;
    for (size_t i = 0; i < x.size(); ++i) {
      float product = x[i] * factor;
      out.q[i] = std::clamp<int>(nearbyintf(product), -127, 127);
    }
    out.scale = absmax * static_cast<float>(1.0 / 127);
  }
  return out;
}

void test_attend(const std::string& name, const Ops& ops, int trials,
                 Tally& tally);

}  // namespace testing
