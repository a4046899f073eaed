// SPDX-License-Identifier: Apache-2.0
// Attention over the vectors of a simd_*.h, included before this.
//
// A row is one query head of one token, row = token * heads + head, so that
// what a row sees grows with its index. Slots go in blocks, with the softmax's
// maximum and sum kept from block to block. Few rows read the cache as it
// lies; for many, a block is first laid out as float32 panels of kTile columns,
// the keys' as [slots / kTile][width][kTile], the values' as
// [width / kTile][slots][kTile].
#pragma once

#include <float.h>
#include <string.h>

#include "exponential_inline.h"
#include "ops.h"
#include "product_inline.h"

namespace tritera {
namespace {

constexpr int kBlock = 256;  // slots
// So many rows read each key and value once or twice: no use for panels.
constexpr int kDirectRows = 2 * kTileRows;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// attend_scratch's floats.
struct Scratch {
  float* sums;    // [rows, padded]: of weights times values, not yet divided
  float* most;    // [rows]: the greatest score so far
  float* totals;  // [rows]: the sum of weights so far
  float* q;       // [kTileRows, width]: scaled
  float* scores;  // [kTileRows, kBlock]; then weights
  float* keys;    // panels
  float* values;
};

// Where each part lies; null-based when only the size is asked for.
inline size_t lay_out(float* base, size_t rows, size_t width, Scratch* parts) {
  size_t padded = round_up(width, kTile), offset = 0;
  bool panels = rows > kDirectRows;
  auto take = [&](size_t floats) {
    float* part = base ? base + offset : nullptr;
    offset += round_up(floats, 16);
    return part;
  };
  parts->sums = take(rows * padded);
  parts->most = take(rows);
  parts->totals = take(rows);
  parts->q = take(kTileRows * width);
  parts->scores = take(kTileRows * kBlock);
  parts->keys = take(panels ? kBlock * width : 0);
  parts->values = take(panels ? kBlock * padded : 0);
  return offset;
}

size_t attend_scratch(int tokens, int heads, int width, int64_t /*seen*/) {
  Scratch parts;
  return lay_out(nullptr, static_cast<size_t>(tokens) * heads, width, &parts);
}

// What the blocks and the rows of a tile need; T is the cache's type.
template <class T>
struct Attention {
  const Attend& call;
  Scratch scratch;
  const T* k;
  const T* v;
  int rows;
  size_t padded;
  bool panels;

  // Slots of the block at `from` that a row sees.
  int visible(int row, int64_t from) const {
    int64_t seen = call.start + row / call.heads + 1 - from;
    return seen < 0 ? 0 : seen < kBlock ? seen : kBlock;
  }
};

// Slots past `n` become zeros: they meet only scores that are masked.
template <class T>
void lay_out_keys(const Attention<T>& a, int64_t from, int n) {
  const int width = a.call.width;
  for (int slot = 0; slot < n; slot += kLanes) {
    int lanes = least(n - slot, kLanes);
    const T* k = a.k + from + slot;
    float* out = a.scratch.keys + slot / kTile * kTile * width + slot % kTile;
    F scale = broadcast(1);
    if (a.call.type == kInt8)
      scale = load_n(a.call.k_scale + from + slot, lanes);
    for (int c = 0; c < width; ++c, k += a.call.slots, out += kTile) {
      F key = load_n(k, lanes);
      store(out, a.call.type == kInt8 ? mul(key, scale) : key);
    }
  }
}

template <class T>
void lay_out_values(const Attention<T>& a, int64_t from, int n) {
  const int width = a.call.width;
  for (int slot = 0; slot < n; ++slot) {
    const T* v = a.v + (from + slot) * width;
    F scale = broadcast(1);
    if (a.call.type == kInt8) scale = broadcast(a.call.v_scale[from + slot]);
    for (int c = 0; c < width; c += kLanes) {
      F value = load_n(v + c, least(width - c, kLanes));
      float* out =
          a.scratch.values + (c / kTile * kBlock + slot) * kTile + c % kTile;
      store(out, a.call.type == kInt8 ? mul(value, scale) : value);
    }
  }
}

// scores[r][slot] = q[r] . k[slot] log2(e) / sqrt(width) for the first n
// slots of a block, a scale of an int8 slot included; what follows, up to a
// whole vector, is anything.
template <class T>
void score(const Attention<T>& a, int first, int rows, int64_t from, int n) {
  const Attend& call = a.call;
  const int width = call.width;
  constexpr float kLog2E = 1.44269504f;
  F scale = broadcast(kLog2E / __builtin_sqrtf(static_cast<float>(width)));
  for (int r = 0; r < rows; ++r) {
    const float* q = call.q + (first + r) / call.heads * call.q_stride +
                     (first + r) % call.heads * width;
    for (int c = 0; c < width; c += kLanes) {
      int lanes = least(width - c, kLanes);
      store_n(a.scratch.q + r * width + c, mul(load_n(q + c, lanes), scale),
              lanes);
    }
  }
  size_t q_stride = width;
  for (int slot = 0; slot < n; slot += kTile) {
    float* out = a.scratch.scores + slot;
    if (a.panels) {
      multiply(Product<float>{a.scratch.q, q_stride,
                              a.scratch.keys + slot * width, kTile, width, out,
                              kBlock, false},
               rows, kTile);
    } else {
      multiply(Product<T>{a.scratch.q, q_stride, a.k + from + slot,
                          static_cast<size_t>(call.slots), width, out, kBlock,
                          false},
               rows, least(n - slot, kTile));
    }
  }
  if (a.panels || call.type != kInt8) return;
  for (int slot = 0; slot < n; slot += kLanes) {
    F scales = load_n(call.k_scale + from + slot, least(n - slot, kLanes));
    for (int r = 0; r < rows; ++r) {
      float* out = a.scratch.scores + r * kBlock + slot;
      store(out, mul(load(out), scales));
    }
  }
}

// Turns the first n > 0 scores of a row into weights, the others of the last
// vector into zeros, and brings what the row has so far to the new maximum.
template <class T>
void weigh(const Attention<T>& a, int row, float* scores, int n) {
  int whole = round_up(n, kLanes);
  for (int slot = n; slot < whole; ++slot) scores[slot] = -__builtin_inff();
  F most = load(scores);
  for (int slot = kLanes; slot < whole; slot += kLanes)
    most = max(most, load(scores + slot));
  float before = a.scratch.most[row], after = reduce_max(most);
  // Not less than -FLT_MAX, where it begins: -inf - -inf would be NaN.
  if (after < before) after = before;
  F shift = broadcast(after), total = broadcast(0);
  for (int slot = 0; slot < whole; slot += kLanes) {
    F weight = power_of_two_at_most_one(sub(load(scores + slot), shift));
    store(scores + slot, weight);
    total = add(total, weight);
  }
  float* totals = a.scratch.totals + row;
  if (after == before) {
    *totals += reduce_add(total);
    return;
  }
  a.scratch.most[row] = after;
  float lanes[kLanes];
  store(lanes, power_of_two_at_most_one(broadcast(before - after)));
  *totals = *totals * lanes[0] + reduce_add(total);
  float* sums = a.scratch.sums + row * a.padded;
  for (size_t c = 0; c < a.padded; c += kLanes)
    store(sums + c, mul(load(sums + c), broadcast(lanes[0])));
}

// sums[r] += weights[r] times the values of slots begin .. end - 1 of a block.
template <class T>
void add_values(const Attention<T>& a, int first, int skip, int rows,
                int64_t from, int begin, int end) {
  const int width = a.call.width;
  const float* weights = a.scratch.scores + skip * kBlock + begin;
  for (int c = 0; c < width; c += kTile) {
    float* out = a.scratch.sums + (first + skip) * a.padded + c;
    if (a.panels) {
      multiply(Product<float>{
                   weights, kBlock,
                   a.scratch.values + (c / kTile * kBlock + begin) * kTile,
                   kTile, end - begin, out, a.padded, true},
               rows - skip, kTile);
    } else {
      multiply(Product<T>{weights, kBlock, a.v + (from + begin) * width + c,
                          static_cast<size_t>(width), end - begin, out,
                          a.padded, true},
               rows - skip, least(width - c, kTile));
    }
  }
}

template <class T>
void attend_tile(const Attention<T>& a, int first, int rows, int64_t from) {
  int n = a.visible(first + rows - 1, from);
  if (n == 0) return;
  score(a, first, rows, from, n);
  for (int r = 0; r < rows; ++r) {
    int seen = a.visible(first + r, from);
    float* scores = a.scratch.scores + r * kBlock;
    if (seen == 0) continue;
    weigh(a, first + r, scores, seen);
    if (a.panels || a.call.type != kInt8) continue;
    for (int slot = 0; slot < seen; slot += kLanes) {
      F scales =
          load_n(a.call.v_scale + from + slot, least(seen - slot, kLanes));
      store(scores + slot, mul(load(scores + slot), scales));
    }
  }
  // All rows share the slots that the first one sees; from there on the ones
  // after it share those of the next token, and so on. A weight of zero would
  // not do for a slot that a row does not see: it may hold a NaN.
  for (int r = 0, begin = 0; r < rows; ++r) {
    int end = a.visible(first + r, from);
    if (end > begin) add_values(a, first, r, rows, from, begin, end);
    begin = end;
  }
}

template <class T>
void attend_as(const Attend& call) {
  Attention<T> a{call,
                 {},
                 static_cast<const T*>(call.k),
                 static_cast<const T*>(call.v),
                 call.tokens * call.heads,
                 round_up(call.width, kTile),
                 call.tokens * call.heads > kDirectRows};
  lay_out(call.scratch, a.rows, call.width, &a.scratch);
  memset(a.scratch.sums, 0, a.rows * a.padded * sizeof(float));
  memset(a.scratch.totals, 0, a.rows * sizeof(float));
  for (int row = 0; row < a.rows; ++row) a.scratch.most[row] = -FLT_MAX;

  int tiles = (a.rows + kTileRows - 1) / kTileRows;
  int64_t seen = call.start + call.tokens;
  for (int64_t from = 0; from < seen; from += kBlock) {
    if (a.panels) {
      int n = least(seen - from, kBlock);
      lay_out_keys(a, from, n);
      lay_out_values(a, from, n);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      int first = tile * a.rows / tiles, end = (tile + 1) * a.rows / tiles;
      attend_tile(a, first, end - first, from);
    }
  }

  for (int row = 0; row < a.rows; ++row) {
    const float* sums = a.scratch.sums + row * a.padded;
    float* y = call.y + row / call.heads * call.y_stride +
               row % call.heads * call.width;
    F factor = broadcast(1 / a.scratch.totals[row]);
    for (int c = 0; c < call.width; c += kLanes)
      store_n(y + c, mul(load(sums + c), factor),
              least(call.width - c, kLanes));
  }
}

void attend(const Attend& call) {
  if (call.type == kInt8)
    attend_as<int8_t>(call);
  else
    attend_as<uint16_t>(call);
}

}  // namespace
}  // namespace tritera
