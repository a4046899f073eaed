// SPDX-License-Identifier: Apache-2.0
// Matrices, inputs and their dots, made from codes by the formats' documents,
// and memory that ends where none may be touched.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "kernel.h"

namespace {

using namespace tritera;

constexpr const char* kNames[kFormats] = {"two_bit", "base_three", "byte"};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 1) {}
  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  int below(int n) { return static_cast<int>(next() % n); }
  int between(int first, int last) { return first + below(last - first + 1); }

 private:
  uint64_t state_;
};

// Memory between two pages that fault.
class Guarded {
 public:
  explicit Guarded(size_t size) {
    const size_t page = sysconf(_SC_PAGESIZE);
    size_ = (size + page - 1) / page * page;
    char* base = static_cast<char*>(mmap(nullptr, size_ + 2 * page,
                                         PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) ||
        mprotect(base + page + size_, page, PROT_NONE)) {
      std::perror("guard pages");
      std::exit(2);
    }
    begin_ = base + page;
  }
  char* last(size_t size) const { return begin_ + size_ - size; }
  char* first() const { return begin_; }

 private:
  char* begin_;
  size_t size_;
};

struct Sizes {
  Format format;
  size_t bytes;
  int rows, tokens;
  int planes() const { return kDigitsPerByte[format]; }
  size_t plane() const { return (bytes + 63) / 64 * 64; }
  size_t segment() const { return planes() * plane(); }
};

uint8_t pack(Format format, const int* digits) {
  if (format == kByte) return digits[0];
  int value = 0;
  if (format == kTwoBit) {
    for (int j = 0; j < 4; ++j) value |= digits[j] << (2 * j);
    return value;
  }
  for (int j = 0; j < 5; ++j) value = 3 * value + digits[j];
  return (256 * value + 242) / 243;
}

enum Data { kRandom, kExtreme, kOutlier, kOnes, kCancel, kMagnitudes, kDatas };

// A matrix and inputs of one length, and what every dot must give.
class Case {
 public:
  Case(Sizes most, size_t inputs, Data data, Random& random)
      : most_(most), packed_(most.rows * most.bytes),
        x_(most.tokens * most.segment()), f_(x_.size()) {
    const int planes = most.planes();
    const int width = most.format == kByte ? 256 : 3;
    std::vector<int> digits(most.rows * planes * most.bytes,
                            kOffset[most.format]);
    // Input k is at position k mod bytes of plane k / bytes.
    const size_t outlier = random.next() % inputs;
    for (int r = 0; r < most.rows; ++r) {
      int* row = &digits[r * planes * most.bytes];
      for (size_t k = 0; k < inputs; ++k) {
        row[k] = data == kExtreme ? width - 1 : random.below(width);
        if (data == kCancel && k % 2) row[k] = row[k - 1];
      }
      if (data == kOutlier) row[outlier] = kOffset[most.format];
      for (size_t p = 0; p < most.bytes; ++p) {
        int byte[5];
        for (int j = 0; j < planes; ++j) byte[j] = row[j * most.bytes + p];
        packed_[r * most.bytes + p] = pack(most.format, byte);
      }
    }
    std::vector<int> x(inputs);
    std::vector<float> f(inputs);
    for (int t = 0; t < most.tokens; ++t) {
      for (size_t k = 0; k < inputs; ++k) {
        x[k] = random.below(256) - 128;
        f[k] = (random.below(1 << 24) - (1 << 23)) * 0x1p-21f;
        if (data == kExtreme) x[k] = t % 2 ? 127 : -128;
        if (data == kOnes) x[k] = 1, f[k] = 1;
        if (data == kOutlier && k == outlier) f[k] = 1e6f;
        if (data == kMagnitudes) f[k] = std::ldexp(f[k], random.below(80) - 40);
        if (data == kCancel) {
          f[k] = std::ldexp(f[k], 20 * random.below(2));
          if (k % 2) f[k] = -f[k - 1] * (1 + random.below(2) * 0x1p-22f);
        }
        const size_t at = t * most.segment() + k / most.bytes * most.plane() +
                          k % most.bytes;
        x_[at] = x[k];
        f_[at] = f[k];
      }
      for (int r = 0; r < most.rows; ++r) {
        const int* row = &digits[r * planes * most.bytes];
        uint32_t sum = 0;  // modulo 2^32, as the interface has it
        double real = 0, size = 0;
        for (size_t k = 0; k < inputs; ++k) {
          sum += static_cast<uint32_t>(row[k] * x[k]);
          const double term =
              static_cast<double>(row[k] - kOffset[most.format]) * f[k];
          real += term;
          size += std::fabs(term);
        }
        sums_.push_back(sum);
        reals_.push_back(real);
        sizes_.push_back(size);
      }
    }
  }

  const Sizes& most() const { return most_; }
  const uint8_t* row(int r) const { return &packed_[r * most_.bytes]; }
  const int8_t* x() const { return x_.data(); }
  const float* f() const { return f_.data(); }
  int32_t sum(int t, int r) const { return sums_[t * most_.rows + r]; }
  bool near(int t, int r, float y) const {
    const double bound = 4 * 0x1p-23 * sizes_[t * most_.rows + r];
    return std::fabs(y - reals_[t * most_.rows + r]) <= bound;
  }
  double share(int t, int r, float y) const {
    const double size = sizes_[t * most_.rows + r];
    return size ? std::fabs(y - reals_[t * most_.rows + r]) / size / 0x1p-23
                : 0;
  }

 private:
  Sizes most_;
  std::vector<uint8_t> packed_;
  std::vector<int8_t> x_;
  std::vector<float> f_;
  std::vector<uint32_t> sums_;
  std::vector<double> reals_, sizes_;
};

}  // namespace
