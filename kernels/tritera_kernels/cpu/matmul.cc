// SPDX-License-Identifier: Apache-2.0
#include "matmul.h"

#include <stdlib.h>

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace tritera {
namespace {

// Tokens whose activations are laid out at once; bounds memory, and lets them
// stay in the second cache.
constexpr int kTokenBlock = 256;
// A chunk of one token's work.
constexpr size_t kChunkBytes = 65536;
constexpr int kPanelRows = 32;  // decoded at once for many tokens
constexpr int kFewTokens = 12;  // for which they are not: see avx512_inline.h
constexpr int kFewTokenRows = 128;
constexpr int kMostRows = 512;  // of a chunk
constexpr int kFloatRows = 64;  // see avx512_inline.h
// Work below this (bytes of weights times tokens) is not worth a helper.
constexpr size_t kAlone = 32768;

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Tokens as the kernels read them.
struct Prepared {
  int count;
  const int8_t* q;        // [token][segment][plane], if int8
  const float* values;    // the same, if float
  const int8_t* tiles;    // [segment] interleaved, if the kernel has tiles
  const float* scale;     // [token]
  const int32_t* sums;    // [token][segment]
};

// A product, and how it is cut into chunks of rows.
struct Work {
  Matrix matrix;
  Output output;
  Planes planes;
  size_t row_bytes;
  int rows;    // of a chunk
  int chunks;

  Work(const Product& product, bool int8, int64_t block, int tokens)
      : matrix(product.matrix),
        output(product.output),
        planes(matrix.planes()),
        row_bytes(planes.segments * planes.bytes) {
    output.y += block * output.stride;
    if (output.residual) output.residual += block * output.stride;
    if (!int8) {
      rows = kFloatRows;
    } else if (tokens > 1) {
      rows = tokens > kFewTokens ? kPanelRows : kFewTokenRows;
    } else {
      rows = static_cast<int>(
          std::clamp<size_t>(kChunkBytes / row_bytes / 4 * 4, 4, kMostRows));
    }
    // So that each thread has some, and the last to end is not long alone.
    while (rows > 16 && matrix.outputs / rows < 8) rows /= 2;
    chunks = static_cast<int>((matrix.outputs + rows - 1) / rows);
  }
};

// The scale of each row, or null where they lie along inputs.
const float* row_scales(const Matrix& m, int64_t first, int rows, float* out) {
  if (m.along_inputs) return nullptr;
  const int64_t run = m.outputs / m.blocks;
  if (run == 1) return m.scale + first;
  for (int r = 0; r < rows;) {
    const int64_t block = (first + r) / run;
    const int64_t end = std::min<int64_t>(rows, (block + 1) * run - first);
    while (r < end) out[r++] = m.scale[block];
  }
  return out;
}

// Sums times scales, over segments in order; every product is rounded before
// it is added (-ffp-contract=off), as the reference says.
template <class Sum>
void scale_and_store(const Work& work, const Prepared& x, const Sum* sums,
                     const float* scales, int64_t first, int rows, int token) {
  const Matrix& m = work.matrix;
  const Output& out = work.output;
  const int segments = work.planes.segments;
  constexpr bool int8 = std::is_integral_v<Sum>;
  const size_t at = token * out.stride + first;
  float y[kMostRows];  // not out.y yet, which may be the residual
  const size_t segment = static_cast<size_t>(x.count) * rows;
  auto value = [&](int s, int r) {
    Sum sum = sums[s * segment + static_cast<size_t>(token) * rows + r];
    if constexpr (int8)
      sum -= kOffset[m.format] * x.sums[token * segments + s];
    return static_cast<float>(sum);
  };
  if (scales) {
    for (int r = 0; r < rows; ++r) y[r] = value(0, r) * scales[r];
  } else {
    for (int r = 0; r < rows; ++r) y[r] = value(0, r) * m.scale[0];
    for (int s = 1; s < segments; ++s)
      for (int r = 0; r < rows; ++r) y[r] += value(s, r) * m.scale[s];
  }
  if constexpr (int8)
    for (int r = 0; r < rows; ++r) y[r] *= x.scale[token];
  if (out.residual)
    for (int r = 0; r < rows; ++r) y[r] = out.residual[at + r] + y[r];
  std::copy_n(y, rows, out.y + at);
}

void multiply_chunk(const Kernel& kernel, const Work& work, const Prepared& x,
                    bool int8, int64_t first, int rows) {
  const Matrix& m = work.matrix;
  const Planes& planes = work.planes;
  uint8_t* scratch = static_cast<uint8_t*>(
      thread_memory(kScratchSlot, scratch_bytes(planes, rows)));
  const size_t segment = static_cast<size_t>(x.count) * rows;
  void* sums = thread_memory(
      kSumsSlot, planes.segments * segment * 4 + rows * sizeof(float));
  float* scale_memory = static_cast<float*>(sums) + planes.segments * segment;
  for (int s = 0; s < planes.segments; ++s) {
    const Rows part{m.data + first * work.row_bytes + s * planes.bytes,
                    work.row_bytes, planes.bytes, rows};
    if (!int8) {
      const Tokens<float> tokens{x.values + s * planes.segment(), planes.plane,
                                 planes.token(), x.count};
      kernel.dot_float[m.format](part, tokens,
                                 static_cast<float*>(sums) + s * segment,
                                 scratch);
      continue;
    }
    int32_t* out = static_cast<int32_t*>(sums) + s * segment;
    if (x.tiles) {
      const size_t tile_tokens = round_up(x.count, 32);
      kernel.dot_tiles[m.format](
          part, x.tiles + s * tile_tokens * planes.segment(), planes.plane,
          x.count, out, scratch);
    } else {
      const Tokens<int8_t> tokens{x.q + s * planes.segment(), planes.plane,
                                  planes.token(), x.count};
      kernel.dot_int8[m.format](part, tokens, out, scratch);
    }
  }
  const float* scales = row_scales(m, first, rows, scale_memory);
  for (int t = 0; t < x.count; ++t) {
    if (int8)
      scale_and_store(work, x, static_cast<int32_t*>(sums), scales, first, rows,
                      t);
    else
      scale_and_store(work, x, static_cast<float*>(sums), scales, first, rows,
                      t);
  }
}

// The tokens first .. first + count - 1 as the kernels read them.
Prepared prepare(Team& team, const Kernel& kernel, const Planes& planes,
                 int64_t inputs, bool int8, int64_t first, int count,
                 const Source& source) {
  Prepared x{};
  x.count = count;
  const size_t size = int8 ? sizeof(int8_t) : sizeof(float);
  const size_t values = round_up(count * planes.token() * size, 64);
  const size_t scales = round_up(count * sizeof(float), 64);
  char* memory = static_cast<char*>(
      thread_memory(kTokensSlot, values + scales +
                                     count * planes.segments * sizeof(int32_t)));
  float* scale = reinterpret_cast<float*>(memory + values);
  int32_t* sums = reinterpret_cast<int32_t*>(memory + values + scales);
  auto one = [&](int t) {
    float* row =
        static_cast<float*>(thread_memory(kRowSlot, inputs * sizeof(float)));
    const float* from = source(first + t, row);
    if (int8) {
      scale[t] = kernel.ops->quantize(
          from, planes,
          reinterpret_cast<int8_t*>(memory) + t * planes.token(),
          sums + t * planes.segments);
    } else {
      kernel.ops->spread(
          from, planes, reinterpret_cast<float*>(memory) + t * planes.token());
    }
  };
  if (count < 8) {
    for (int t = 0; t < count; ++t) one(t);
  } else {
    team.run(count, one);
  }
  if (!int8) {
    x.values = reinterpret_cast<float*>(memory);
    return x;
  }
  x.q = reinterpret_cast<int8_t*>(memory);
  x.scale = scale;
  x.sums = sums;
  if (kernel.interleave && count >= kernel.tile_tokens) {
    const size_t tokens = round_up(count, 32);
    int8_t* tiles = static_cast<int8_t*>(
        thread_memory(kTilesSlot, tokens * planes.token()));
    for (int s = 0; s < planes.segments; ++s) {
      kernel.interleave(x.q + s * planes.segment(), planes.token(),
                        planes.segment(), count,
                        tiles + s * tokens * planes.segment());
    }
    x.tiles = tiles;
  }
  return x;
}

}  // namespace

Planes Matrix::planes() const {
  Planes planes;
  planes.segments = along_inputs ? blocks : 1;
  planes.planes = kDigitsPerByte[format];
  planes.inputs = inputs / planes.segments;
  planes.bytes = (planes.inputs + planes.planes - 1) / planes.planes;
  planes.plane = round_up(planes.bytes, 64);
  return planes;
}

size_t Matrix::row_bytes() const {
  const Planes p = planes();
  return p.segments * p.bytes;
}

void multiply(Team& team, const Kernel& kernel, int64_t tokens, bool int8,
              const Source& source, const Product* products, int count) {
  const Planes planes = products[0].matrix.planes();
  for (int64_t block = 0; block < tokens; block += kTokenBlock) {
    const int block_tokens =
        static_cast<int>(std::min<int64_t>(kTokenBlock, tokens - block));
    const Prepared x = prepare(team, kernel, planes, products[0].matrix.inputs,
                               int8, block, block_tokens, source);
    std::vector<Work> works;
    int chunks = 0;
    size_t cost = 0;
    for (int i = 0; i < count; ++i) {
      const Work& work =
          works.emplace_back(products[i], int8, block, block_tokens);
      chunks += work.chunks;
      cost += work.matrix.outputs * work.row_bytes * block_tokens;
    }
    auto one = [&](int chunk) {
      const Work* work = works.data();
      while (chunk >= work->chunks) chunk -= (work++)->chunks;
      const int64_t first = static_cast<int64_t>(chunk) * work->rows;
      const int rows = static_cast<int>(
          std::min<int64_t>(work->rows, work->matrix.outputs - first));
      multiply_chunk(kernel, *work, x, int8, first, rows);
    };
    if (cost < kAlone) {
      for (int i = 0; i < chunks; ++i) one(i);
    } else {
      team.run(chunks, one);
    }
  }
}

void* thread_memory(Slot slot, size_t bytes) {
  struct Memory {
    void* data[kSlots] = {};
    size_t size[kSlots] = {};
    ~Memory() {
      for (void* p : data) free(p);
    }
  };
  thread_local Memory memory;
  if (memory.size[slot] < bytes) {
    free(memory.data[slot]);
    memory.size[slot] = 0;
    const size_t wanted = round_up(bytes + bytes / 4, 4096);
    memory.data[slot] = aligned_alloc(4096, wanted);
    if (!memory.data[slot]) throw std::bad_alloc();
    memory.size[slot] = wanted;
  }
  return memory.data[slot];
}

}  // namespace tritera
