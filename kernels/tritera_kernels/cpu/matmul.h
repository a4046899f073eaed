// SPDX-License-Identifier: Apache-2.0
// Multiplication of tokens by packed matrices, shared among threads.
#pragma once

#include <stdint.h>

#include <functional>

#include "kernel.h"
#include "parallel.h"

namespace tritera {

// As tritera_kernels.packed.PackedTernary, or with `format` kByte and one
// scale a row as ByteMatrix.
struct Matrix {
  Format format;
  const uint8_t* data;
  const float* scale;
  int64_t outputs;  // N
  int64_t inputs;   // K
  int blocks;       // scales
  bool along_inputs;

  Planes planes() const;
  size_t row_bytes() const;
};

// y[t * stride + n] = residual[t * stride + n] + the product.
struct Output {
  float* y;
  int64_t stride;
  const float* residual;  // or null
};

struct Product {
  Matrix matrix;
  Output output;
};

// Where a token's inputs come from: fills K floats, or returns others.
using Source = std::function<const float*(int64_t token, float* row)>;

// y = x W^T for each product, all of the same planes: the arithmetic of
// tritera_kernels.matmul.reference, bit by bit if `int8`.
void multiply(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
              const Source& source, const Product* products, int count);

// A thread's own memory, 64-byte aligned; kept for the next call. Each place
// that may be in use at once has a slot.
enum Slot { kScratchSlot, kSumsSlot, kTokensSlot, kTilesSlot, kRowSlot,
            kStepSlot, kSlots };
void* thread_memory(Slot slot, size_t bytes);

}  // namespace tritera
