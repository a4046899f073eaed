// SPDX-License-Identifier: Apache-2.0
// What a file of one instruction set gives to the drivers.
//
// Such a file (portable.cc, avx2.cc, ...) is compiled with flags of its own.
// Whatever it defines inline may be the copy that the linker keeps for all
// files, on a processor that cannot run it: so these files use C headers,
// intrinsics and unnamed namespaces, and nothing of the C++ library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace tritera {

// two_bit and base_three are those of tritera_kernels.formats. In `byte` a
// digit is a byte: an int8 weight plus 128 (a quantised head or embedding).
enum Format { kTwoBit, kBaseThree, kByte };
constexpr int kFormats = 3;
constexpr int kDigitsPerByte[kFormats] = {4, 5, 1};
// digit = weight + offset.
constexpr int kOffset[kFormats] = {1, 1, 128};

// How the K inputs of a token lie in memory, for a format: segment by segment,
// each as planes of `bytes` values, padded with zeros to `plane`. Byte p of a
// packed segment holds the digits that meet x[0][p], x[1][p], ...
struct Planes {
  int segments;
  int planes;     // digits a byte
  size_t inputs;  // of a segment: K / segments
  size_t bytes;   // of a packed segment: ceil(inputs / planes)
  size_t plane;   // bytes rounded up to a multiple of 64

  size_t segment() const { return planes * plane; }  // values of a segment
  // From token to token: a line more, or tokens of 2^n inputs would fall into
  // the same sets of a cache.
  size_t token() const { return segments * segment() + 64; }
};

// Rows of one packed segment. Bytes past `bytes` must not be read.
struct Rows {
  const uint8_t* data;
  size_t stride;  // from row to row, in bytes
  size_t bytes;   // of the segment, in a row
  int count;
};

// One segment of some tokens, as `Planes` says; 64-byte aligned.
template <class T>
struct Tokens {
  const T* x;
  size_t plane;  // values from plane to plane
  size_t token;  // values from token to token
  int count;
};

// A kernel may use `scratch`: 64-byte aligned, of at least this many bytes.
inline size_t scratch_bytes(const Planes& planes, int rows) {
  return (rows + 63) / 64 * 64 * (planes.segment() + 64) + 4096;
}

struct Ops;  // ops.h

struct Kernel {
  const char* name;
  // sums[t * rows.count + r] = sum of digit * x over the segment.
  void (*dot_int8[kFormats])(const Rows& rows, const Tokens<int8_t>& tokens,
                             int32_t* sums, uint8_t* scratch);
  // sums[t * rows.count + r] = sum of code * x over the segment, with an error
  // of at most 4 eps sum |code * x|, where eps = 2^-23. two_bit and base_three.
  void (*dot_float[2])(const Rows& rows, const Tokens<float>& tokens,
                       float* sums, uint8_t* scratch);
  // Matrix tiles, or null. `interleave` copies `length` bytes (a multiple of
  // 64) of each token for `dot_tiles`: `out` holds tokens rounded up to 32.
  void (*interleave)(const int8_t* x, size_t token, size_t length, int tokens,
                     int8_t* out);
  void (*dot_tiles[kFormats])(const Rows& rows, const int8_t* interleaved,
                              size_t plane, int tokens, int32_t* sums,
                              uint8_t* scratch);
  // Fewest tokens for which dot_tiles is worth it.
  int tile_tokens;
  const Ops* ops;
};

// Null where the compiler or the target cannot make it.
const Kernel* portable_kernel();
const Kernel* avx2_kernel();
const Kernel* avx512_kernel();
const Kernel* amx_kernel();
const Kernel* neon_kernel();
const Kernel* neon_i8mm_kernel();

// Whether this process may use AMX's tiles; asks the system for it.
bool amx_allowed();

}  // namespace tritera
