// SPDX-License-Identifier: Apache-2.0
// Small matrix products over the vectors of a simd_*.h, included before this.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tritera {
namespace {

constexpr int kTile = kTileColumns * kLanes;

// out[r][j] (+)= sum over d < depth of a[r][d] * b[d][j], for `rows` <=
// kTileRows rows and a few vectors of columns.
template <class T>
struct Product {
  const float* a;
  size_t a_stride;
  const T* b;
  size_t b_stride;
  int64_t depth;
  float* out;
  size_t out_stride;
  bool accumulate;
};

// With `partial` only the first `lanes` of the last vector of b are read; the
// others count as zeros. `out` is written in whole vectors.
template <int rows, int columns, bool partial, class T>
void multiply_tile(const Product<T>& p, int lanes) {
  F sums[rows][columns];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) sums[r][j] = broadcast(0);
  const float* a = p.a;
  const T* b = p.b;
  const size_t a_stride = p.a_stride, b_stride = p.b_stride;
  for (int64_t d = 0; d < p.depth; ++d, ++a, b += b_stride) {
    // The next tile of a cache, whose rows lie too far apart for the
    // processor to foresee.
    if (sizeof(T) < sizeof(float)) __builtin_prefetch(b + kTile);
    F values[columns];
    for (int j = 0; j < columns; ++j)
      values[j] = partial && j == columns - 1 ? load_n(b + j * kLanes, lanes)
                                              : load(b + j * kLanes);
    for (int r = 0; r < rows; ++r) {
      F factor = broadcast(a[r * a_stride]);
      for (int j = 0; j < columns; ++j)
        sums[r][j] = fma(factor, values[j], sums[r][j]);
    }
  }
  // Two loops: a branch inside would put the sums into memory.
  if (p.accumulate) {
    for (int r = 0; r < rows; ++r) {
      for (int j = 0; j < columns; ++j) {
        float* out = p.out + r * p.out_stride + j * kLanes;
        store(out, add(load(out), sums[r][j]));
      }
    }
  } else {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < columns; ++j)
        store(p.out + r * p.out_stride + j * kLanes, sums[r][j]);
  }
}

template <int columns, bool partial, class T>
inline void multiply_rows(const Product<T>& p, int rows, int lanes) {
  constexpr int kMost = kTileRows;
  switch (rows) {
#define TRITERA_ROWS(n)                                                   \
  case n:                                                                 \
    return multiply_tile<(n < kMost ? n : kMost), columns, partial>(p, lanes);
    TRITERA_ROWS(1)
    TRITERA_ROWS(2)
    TRITERA_ROWS(3)
    TRITERA_ROWS(4)
    TRITERA_ROWS(5)
    TRITERA_ROWS(6)
    TRITERA_ROWS(7)
    TRITERA_ROWS(8)
#undef TRITERA_ROWS
  }
}

// Columns 0 .. columns - 1 <= kTile of `b`, where nothing past them is read.
// Columns of `out` up to the next multiple of kLanes are written.
template <class T>
inline void multiply(Product<T> p, int rows, int columns) {
  if (columns == kTile)
    return multiply_rows<kTileColumns, false>(p, rows, kLanes);
  for (; columns > 0; columns -= kLanes) {
    multiply_rows<1, true>(p, rows, columns < kLanes ? columns : kLanes);
    p.b += kLanes;
    p.out += kLanes;
  }
}

}  // namespace
}  // namespace tritera
