// SPDX-License-Identifier: Apache-2.0
// Matrix tiles of Intel's AMX for many tokens; the rest is that of AVX-512.
#include "kernel.h"

#include "ops.h"

#if defined(__linux__) && defined(__AVX512BW__) && \
    (defined(__AMX_INT8__) || defined(TRITERA_EMULATE_AMX))
#include <string.h>

#include "avx512_inline.h"

#if defined(TRITERA_EMULATE_AMX)
#include "amx_emulation.h"
#else
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tritera {
namespace {

constexpr size_t kStep = 64;        // bytes of a row of a tile
constexpr int kSide = 16;           // rows of a tile, and tokens of one
constexpr size_t kTile = kSide * kStep;
constexpr int kPanel = 2 * kSide;   // rows, and tokens, of four sums

// gcc 12 does not see that tile instructions read and write memory.
inline void fence() { asm volatile("" ::: "memory"); }

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};
};

void configure() {
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.colsb[i] = kStep;
    config.rows[i] = kSide;
  }
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

inline int tiles_of(int tokens) { return (tokens + kPanel - 1) / kPanel * 2; }

// out: [64 bytes][tile of 16 tokens][4 bytes][token], so that the bytes of a
// segment of all tokens follow each other.
void interleave(const int8_t* x, size_t token, size_t length, int tokens,
                int8_t* out) {
  const int tiles = tiles_of(tokens);
  for (size_t k = 0; k < length; k += kStep) {
    for (int tile = 0; tile < tiles; ++tile, out += kTile) {
      __m512i v[kSide];
      for (int i = 0; i < kSide; ++i) {
        const int t = tile * kSide + i;
        v[i] = t < tokens ? _mm512_load_si512(x + t * token + k)
                          : _mm512_setzero_si512();
      }
      transpose(v);
      for (int i = 0; i < kSide; ++i)
        _mm512_store_si512(out + i * kStep, v[i]);
    }
  }
}

// Nine times each byte: the two leading trits, and the rest.
inline void two_trits(__m512i v, __m512i* digits, __m512i* rest) {
  const __m512i low = _mm512_set1_epi16(0xff);
  const __m512i even = _mm512_maddubs_epi16(v, _mm512_set1_epi16(9));
  const __m512i odd = _mm512_maddubs_epi16(v, _mm512_set1_epi16(9 << 8));
  // 0xca: the first where the mask is, the second elsewhere.
  const __m512i pair = _mm512_ternarylogic_epi32(
      low, _mm512_srli_epi16(even, 8), odd, 0xca);
  *rest = _mm512_ternarylogic_epi32(low, even, _mm512_slli_epi16(odd, 8), 0xca);
  const __m128i first =
      _mm_setr_epi8(0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0);
  const __m128i second =
      _mm_setr_epi8(0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0);
  digits[0] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(first), pair);
  digits[1] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(second), pair);
}

template <Format format>
inline void unpack(__m512i v, __m512i* digits) {
  if (format == kByte) {
    digits[0] = v;
  } else if (format == kTwoBit) {
    for (int j = 0; j < 4; ++j) {
      digits[j] = _mm512_and_si512(_mm512_srli_epi16(v, 2 * j),
                                   _mm512_set1_epi8(3));
    }
  } else {
    __m512i rest;
    two_trits(v, digits, &rest);
    two_trits(rest, digits + 2, &rest);
    // 3/4 of the rest, rounded up; of a valid byte it is not 85, 170 or 255.
    const __m512i half = _mm512_avg_epu8(rest, _mm512_setzero_si512());
    digits[4] = _mm512_and_si512(
        _mm512_srli_epi16(_mm512_avg_epu8(rest, half), 6), _mm512_set1_epi8(3));
  }
}

// Up to 32 rows from `first` on, as [64 digits][tile of 16 rows][row].
template <Format format>
void unpack_panel(const Rows& rows, int first, size_t plane, uint8_t* out) {
  constexpr int kPlanes = kDigitsPerByte[format];
  for (int i = 0; i < kPanel; ++i) {
    const bool there = first + i < rows.count;
    const uint8_t* row = rows.data + (there ? first + i : 0) * rows.stride;
    uint8_t* to = out + i * kStep;
    for (size_t p = 0; p < plane; p += kStep, to += 2 * kTile) {
      const size_t left = there && p < rows.bytes ? rows.bytes - p : 0;
      const __mmask64 mask = left < kStep ? (__mmask64{1} << left) - 1 : ~0ull;
      if (there) _mm_prefetch(row + p + 4096, _MM_HINT_T0);
      __m512i digits[kPlanes];
      unpack<format>(_mm512_maskz_loadu_epi8(mask, row + p), digits);
      for (int j = 0; j < kPlanes; ++j)
        _mm512_store_si512(to + j * plane * kPanel, digits[j]);
    }
  }
}

// Tiles 0 to 3: sums of (row tile, token tile) 00, 01, 10, 11, of which the
// second ones may be left out.
template <bool two_rows, bool two_tokens>
void multiply(const uint8_t* a, const int8_t* b, size_t steps, size_t b_step,
              uint8_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (size_t s = 0; s < steps; ++s, a += 2 * kTile, b += b_step) {
    _tile_loadd(4, a, kStep);
    _tile_loadd(6, b, kStep);
    _tile_dpbusd(0, 4, 6);
    if (two_tokens) {
      _tile_loadd(7, b + kTile, kStep);
      _tile_dpbusd(1, 4, 7);
    }
    if (two_rows) {
      _tile_loadd(5, a + kTile, kStep);
      _tile_dpbusd(2, 5, 6);
      if (two_tokens) _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kStep);
  if (two_tokens) _tile_stored(1, sums + kTile, kStep);
  if (two_rows) _tile_stored(2, sums + 2 * kTile, kStep);
  if (two_rows && two_tokens) _tile_stored(3, sums + 3 * kTile, kStep);
}

// A tile [row][token] to sums[token * stride + row].
void put(const uint8_t* tile, int rows, int tokens, size_t stride,
         int32_t* sums) {
  __m512i v[kSide];
  for (int i = 0; i < kSide; ++i) v[i] = _mm512_load_si512(tile + i * kStep);
  transpose(v);
  const __mmask16 mask = rows < kSide ? (1 << rows) - 1 : 0xffff;
  for (int i = 0; i < kSide; ++i) {
    if (i < tokens) _mm512_mask_storeu_epi32(sums + i * stride, mask, v[i]);
  }
}

template <Format format>
void dot_tiles(const Rows& rows, const int8_t* interleaved, size_t plane,
               int tokens, int32_t* sums, uint8_t* scratch) {
  const size_t segment = kDigitsPerByte[format] * plane;
  uint8_t* panel = scratch;
  uint8_t* out = scratch + kPanel * segment;  // four tiles
  const size_t steps = segment / kStep;
  const size_t b_step = tiles_of(tokens) * kTile;
  configure();
  for (int r = 0; r < rows.count; r += kPanel) {
    unpack_panel<format>(rows, r, plane, panel);
    const int rows_left = rows.count - r;
    for (int t = 0; t < tokens; t += kPanel) {
      const int8_t* b = interleaved + t / kSide * kTile;
      const int tokens_left = tokens - t;
      const bool two_tokens = tokens_left > kSide;
      fence();
      if (rows_left > kSide) {
        (two_tokens ? multiply<true, true> : multiply<true, false>)(
            panel, b, steps, b_step, out);
      } else {
        (two_tokens ? multiply<false, true> : multiply<false, false>)(
            panel, b, steps, b_step, out);
      }
      fence();
      for (int i = 0; i < 4; ++i) {
        const int row = i / 2 * kSide, token = i % 2 * kSide;
        if (row >= rows_left || token >= tokens_left) continue;
        put(out + i * kTile, rows_left - row, tokens_left - token, rows.count,
            sums + static_cast<size_t>(t + token) * rows.count + r + row);
      }
    }
  }
  _tile_release();
}

Kernel with_tiles(const Kernel& rest) {
  Kernel kernel = rest;
  kernel.name = "amx";
  kernel.interleave = interleave;
  kernel.dot_tiles[kTwoBit] = dot_tiles<kTwoBit>;
  kernel.dot_tiles[kBaseThree] = dot_tiles<kBaseThree>;
  kernel.dot_tiles[kByte] = dot_tiles<kByte>;
  // An estimate: a tile of 16 tokens takes as long as some 4 by VNNI, and the
  // tokens are copied once more.
  kernel.tile_tokens = 8;
  return kernel;
}

}  // namespace

// Asks the system, for the whole process, for the registers of the tiles.
bool amx_allowed() {
#if defined(TRITERA_EMULATE_AMX)
  return true;
#else
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}

const Kernel* amx_kernel() {
  const Kernel* rest = avx512_kernel();
  if (!rest) return nullptr;
  static const Kernel kernel = with_tiles(*rest);
  return &kernel;
}

}  // namespace tritera

#else

namespace tritera {
bool amx_allowed() { return false; }
const Kernel* amx_kernel() { return nullptr; }
}  // namespace tritera

#endif
