// SPDX-License-Identifier: Apache-2.0
// The tile instructions that amx.cc uses, in plain C++, so that a processor
// without them can test it. A fault of the processor aborts here.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace tritera {
namespace {
namespace emulated {

struct Tile {
  int rows, colsb;
  uint8_t bytes[16][64];
};

// Configured with palette 1, or else every use of a tile faults.
thread_local bool configured = false;
thread_local Tile tiles[8];

inline void fault_unless(bool good) {
  if (!good) abort();
}

inline Tile& tile(int i) {
  fault_unless(configured && tiles[i].rows > 0 && tiles[i].colsb > 0);
  return tiles[i];
}

inline void loadconfig(const void* from) {
  uint8_t c[64];
  memcpy(c, from, sizeof c);
  memset(tiles, 0, sizeof tiles);
  configured = c[0] == 1;
  if (c[0] == 0) return;
  fault_unless(configured && c[1] == 0);
  for (int i = 2; i < 16; ++i) fault_unless(c[i] == 0);
  for (int i = 8; i < 16; ++i) {
    fault_unless(c[16 + 2 * i] == 0 && c[17 + 2 * i] == 0 && c[48 + i] == 0);
  }
  for (int i = 0; i < 8; ++i) {
    tiles[i].colsb = c[16 + 2 * i] | c[17 + 2 * i] << 8;
    tiles[i].rows = c[48 + i];
    fault_unless(tiles[i].colsb <= 64 && tiles[i].rows <= 16);
    fault_unless((tiles[i].colsb == 0) == (tiles[i].rows == 0));
  }
}

inline void release() {
  configured = false;
  memset(tiles, 0, sizeof tiles);
}

inline void zero(int i) {
  Tile& t = tile(i);
  memset(t.bytes, 0, sizeof t.bytes);
}

inline void load(int i, const void* from, ptrdiff_t stride) {
  Tile& t = tile(i);
  memset(t.bytes, 0, sizeof t.bytes);
  for (int r = 0; r < t.rows; ++r)
    memcpy(t.bytes[r], static_cast<const char*>(from) + r * stride, t.colsb);
}

inline void store(int i, void* to, ptrdiff_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r)
    memcpy(static_cast<char*>(to) + r * stride, t.bytes[r], t.colsb);
}

inline void dpbusd(int to, int a_index, int b_index) {
  Tile& c = tile(to);
  const Tile &a = tile(a_index), &b = tile(b_index);
  fault_unless(to != a_index && to != b_index && a_index != b_index);
  fault_unless(a.colsb % 4 == 0 && b.colsb % 4 == 0 && c.colsb % 4 == 0);
  fault_unless(c.rows == a.rows && c.colsb == b.colsb);
  fault_unless(a.colsb == 4 * b.rows);
  for (int m = 0; m < a.rows; ++m) {
    for (int n = 0; n < b.colsb / 4; ++n) {
      uint32_t sum;
      memcpy(&sum, &c.bytes[m][4 * n], 4);
      for (int k = 0; k < a.colsb; ++k) {
        const int x = static_cast<int8_t>(b.bytes[k / 4][4 * n + k % 4]);
        sum += static_cast<uint32_t>(a.bytes[m][k] * x);
      }
      memcpy(&c.bytes[m][4 * n], &sum, 4);
    }
  }
}

}  // namespace emulated
}  // namespace
}  // namespace tritera

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#define _tile_loadconfig(from) emulated::loadconfig(from)
#define _tile_release() emulated::release()
#define _tile_zero(i) emulated::zero(i)
#define _tile_loadd(i, from, stride) emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) emulated::store(i, to, stride)
#define _tile_dpbusd(to, a, b) emulated::dpbusd(to, a, b)
