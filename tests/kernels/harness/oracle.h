// SPDX-License-Identifier: Apache-2.0
// Matrices made from their weights, and what products with them must be.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "case.h"
#include "matmul.h"
#include "ops_testing.h"

namespace testing {

using tritera::Format;
using tritera::kByte;

// Scales along the outputs, or along the inputs: a segment each.
struct Weights {
  Format format;
  int64_t outputs, inputs;
  int blocks;
  bool along_inputs;
  std::vector<int8_t> w;  // [N][K]
  Block<uint8_t> data;
  Block<float> scale;

  Weights(Format format, int64_t outputs, int64_t inputs, int blocks,
          bool along_inputs, Random& random)
      : format(format), outputs(outputs), inputs(inputs), blocks(blocks),
        along_inputs(along_inputs), w(outputs * inputs),
        data(outputs * matrix_of(nullptr, nullptr).row_bytes()),
        scale(blocks) {
    for (int8_t& value : w)
      value = format == kByte ? random.integer(-128, 127)
                              : random.integer(-1, 1);
    for (int i = 0; i < blocks; ++i)
      scale[i] = std::exp(random.normal() - 3);
    const tritera::Planes planes = matrix().planes();
    uint8_t* to = data.get();
    for (int64_t n = 0; n < outputs; ++n)
      for (int s = 0; s < planes.segments; ++s)
        for (size_t p = 0; p < planes.bytes; ++p)
          *to++ = packed(&w[n * inputs + s * planes.inputs], planes, p);
  }

  tritera::Matrix matrix() const { return matrix_of(data.get(), scale.get()); }
  int segments() const { return along_inputs ? blocks : 1; }
  float scale_of(int64_t n, int segment) const {
    return scale[along_inputs ? segment : n / (outputs / blocks)];
  }

 private:
  tritera::Matrix matrix_of(const uint8_t* data, const float* scale) const {
    return {format, data, scale, outputs, inputs, blocks, along_inputs};
  }

  // Byte p: the digits of inputs p, bytes + p, 2 bytes + p, ...
  uint8_t packed(const int8_t* from, const tritera::Planes& planes,
                 size_t p) const {
    int digits[5];
    for (int j = 0; j < planes.planes; ++j) {
      const size_t k = j * planes.bytes + p;
      digits[j] =
          tritera::kOffset[format] + (k < planes.inputs ? from[k] : 0);
    }
    return pack(format, digits);
  }
};

// What x W^T is, for x [M][K]: of int8 the bits, of float the neighbourhood.
class Oracle {
 public:
  Oracle(const Weights& weights, const float* x, int64_t tokens, bool int8)
      : weights_(weights), int8_(int8) {
    const int64_t K = weights.inputs;
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<float> token(x + t * K, x + (t + 1) * K);
      if (int8)
        exact(quantized(token));
      else
        near(token);
    }
  }

  // Of y, or of y after it was added to a residual; 1 is what is allowed.
  double error(int64_t t, int64_t n, float y,
               const float* residual = nullptr) const {
    const size_t at = t * weights_.outputs + n;
    if (int8_) {
      const float wanted = residual ? *residual + exact_[at] : exact_[at];
      return same_bits(y, wanted) ? 0 : kInf;
    }
    const Near& near = near_[at];
    if (std::isnan(near.value)) return std::isnan(y) ? 0 : kInf;
    // The kernel's 4 eps, half a one for each product with a scale and each
    // sum of segments, and for the residual.
    const double eps = std::ldexp(1, -23);
    double wanted = near.value;
    double allowed = (5 + weights_.segments() / 2.0) * eps * near.size + 1e-37;
    if (residual) {
      wanted += *residual;
      allowed += eps * std::fabs(wanted);
    }
    const double share = std::fabs(y - wanted) / allowed;
    return std::isnan(share) ? kInf : share;
  }

 private:
  struct Near {
    double value, size;
  };

  void exact(const Quantized& token) {
    const int64_t K = weights_.inputs, segment = K / weights_.segments();
    for (int64_t n = 0; n < weights_.outputs; ++n) {
      float y = 0;
      for (int s = 0; s < weights_.segments(); ++s) {
        const int8_t* w = &weights_.w[n * K + s * segment];
        int32_t sum = 0;
        for (int64_t k = 0; k < segment; ++k)
          sum += w[k] * token.q[s * segment + k];
        const float product =
            static_cast<float>(sum) * weights_.scale_of(n, s);
        y = s ? y + product : product;
      }
      exact_.push_back(y * token.scale);
    }
  }

  void near(const std::vector<float>& token) {
    const int64_t K = weights_.inputs, segment = K / weights_.segments();
    for (int64_t n = 0; n < weights_.outputs; ++n) {
      Near near{0, 0};
      for (int64_t k = 0; k < K; ++k) {
        const int8_t w = weights_.w[n * K + k];
        const double term = static_cast<double>(w) * token[k] *
                            weights_.scale_of(n, k / segment);
        near.value += term;
        near.size += std::fabs(term);
      }
      near_.push_back(near);
    }
  }

  const Weights& weights_;
  bool int8_;
  std::vector<float> exact_;
  std::vector<Near> near_;
};

}  // namespace testing
