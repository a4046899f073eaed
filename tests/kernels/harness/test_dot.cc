// SPDX-License-Identifier: Apache-2.0
// Every kernel of this machine against sums over codes, exactly.
//
//   test_dot [all | sweep | fuzz N SEED | team SCALE | bench M]
//
// The bytes are packed here, from the layout that the formats document, and
// not by the library. The packed matrix, the inputs, the sums and the scratch
// end where a page begins that may not be touched.
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "case.h"
#include "harness.h"
#include "kernel.h"
#include "machine.h"

namespace {

struct Count {
  long calls = 0, dots = 0, wrong = 0;
  double most = 0;  // error in eps sum |code x|
};

struct Tested {
  const Kernel* kernel;
  Count int8[kFormats], real[kFormats], tiles[kFormats];
};

struct Arenas {
  Guarded packed{8 << 20}, x{256 << 20}, sums{1 << 20}, scratch{512 << 20},
      tiles{256 << 20};
};

size_t scratch_size(const Sizes& sizes) {
  const Planes planes = {1, sizes.planes(), sizes.bytes * sizes.planes(),
                         sizes.bytes, sizes.plane()};
  return scratch_bytes(planes, sizes.rows);
}

void report(const char* kernel, const char* what, const Sizes& s,
            size_t stride, int t, int r) {
  std::printf("WRONG %s %s %s bytes %zu rows %d tokens %d stride %zu at token "
              "%d row %d\n", kernel, what, kNames[s.format], s.bytes, s.rows,
              s.tokens, stride, t, r);
}

// The kernel on the first rows and tokens of `c`; `check` false: only that it
// stays within its memory.
void run(Tested& tested, const Case& c, int rows, int tokens, size_t gap,
         bool at_end, size_t shift, bool check, const Arenas& arenas) {
  const Kernel& kernel = *tested.kernel;
  Sizes s = c.most();
  s.rows = rows;
  s.tokens = tokens;
  const size_t stride = s.bytes + gap;
  const size_t size = (rows - 1) * stride + s.bytes;
  uint8_t* data = reinterpret_cast<uint8_t*>(
      at_end ? arenas.packed.last(size) : arenas.packed.first() + shift);
  for (int r = 0; r < rows; ++r) {
    std::memcpy(data + r * stride, c.row(r), s.bytes);
    if (r + 1 < rows) std::memset(data + r * stride + s.bytes, 0xff, gap);
  }
  const Rows packed = {data, stride, s.bytes, rows};
  const size_t values = tokens * s.segment();
  const size_t dots = static_cast<size_t>(rows) * tokens;
  uint8_t* scratch =
      reinterpret_cast<uint8_t*>(arenas.scratch.last(scratch_size(s)));
  // An untouched sum must not pass for a right one.
  const auto sums = [&](size_t bytes) {
    std::memset(arenas.sums.last(bytes), 0x7f, bytes);
    return arenas.sums.last(bytes);
  };

  int8_t* x = reinterpret_cast<int8_t*>(arenas.x.last(values));
  std::memcpy(x, c.x(), values);
  const auto same = [&](const int32_t* y, Count& count, const char* what) {
    ++count.calls;
    count.dots += dots;
    for (int t = 0; check && t < tokens; ++t) {
      for (int r = 0; r < rows; ++r) {
        if (y[t * rows + r] == c.sum(t, r)) continue;
        if (!count.wrong++) report(kernel.name, what, s, stride, t, r);
      }
    }
  };
  if (kernel.dot_int8[s.format]) {
    int32_t* y = reinterpret_cast<int32_t*>(sums(dots * 4));
    kernel.dot_int8[s.format](packed, {x, s.plane(), s.segment(), tokens}, y,
                              scratch);
    same(y, tested.int8[s.format], "dot_int8");
  }
  if (kernel.dot_tiles[s.format]) {
    // Alone, or as the second of two segments of a token.
    const int before = tokens % 2 && s.bytes < 5000;
    const size_t length = (before + 1) * s.segment();
    int8_t* whole = reinterpret_cast<int8_t*>(arenas.x.first());
    for (int t = 0; t < tokens; ++t) {
      std::memset(whole + t * length, 0x55, before * s.segment());
      std::memcpy(whole + t * length + before * s.segment(),
                  c.x() + t * s.segment(), s.segment());
    }
    const size_t room = (tokens + 31) / 32 * 32 * s.segment();
    int8_t* at = reinterpret_cast<int8_t*>(arenas.tiles.last(room));
    kernel.interleave(whole + before * s.segment(), length, s.segment(), tokens,
                      at);
    int32_t* y = reinterpret_cast<int32_t*>(sums(dots * 4));
    kernel.dot_tiles[s.format](packed, at, s.plane(), tokens, y, scratch);
    same(y, tested.tiles[s.format], "dot_tiles");
  }
  if (s.format != kByte && kernel.dot_float[s.format]) {
    float* f = reinterpret_cast<float*>(arenas.x.last(values * 4));
    std::memcpy(f, c.f(), values * 4);
    float* y = reinterpret_cast<float*>(sums(dots * 4));
    kernel.dot_float[s.format](packed, {f, s.plane(), s.segment(), tokens}, y,
                               scratch);
    Count& count = tested.real[s.format];
    ++count.calls;
    count.dots += dots;
    for (int t = 0; check && t < tokens; ++t) {
      for (int r = 0; r < rows; ++r) {
        const float got = y[t * rows + r];
        count.most = std::max(count.most, c.share(t, r, got));
        if (c.near(t, r, got)) continue;
        if (!count.wrong++) report(kernel.name, "dot_float", s, stride, t, r);
      }
    }
  }
}

void sweep(std::vector<Tested>& tested, const Arenas& arenas, int thin) {
  Random random(1);
  std::vector<int> lengths = {410, 448, 512, 615, 768, 1023, 1024, 1127,
                              1408, 1411, 2049, 2503, 3000};
  for (int bytes = 1; bytes <= 200; bytes += thin) lengths.push_back(bytes);
  const size_t gaps[] = {0, 0, 1, 7, 24, 32, 61, 64};
  for (int format = 0; format < kFormats; ++format) {
    for (const int bytes : lengths) {
      const Sizes most = {static_cast<Format>(format),
                          static_cast<size_t>(bytes), 70, 40};
      const int planes = most.planes();
      // Every number of inputs that takes so many bytes, in turn.
      const Data data = static_cast<Data>(bytes % kDatas);
      const Case c(most, bytes * planes - bytes / kDatas % planes, data,
                   random);
      std::vector<std::pair<int, int>> shapes = {
          {1, 1}, {4, 1}, {7, 2}, {8, 3}, {64, 1}, {70, 40}};
      for (int i = 0; i < (bytes > 200 ? 6 : 24) / thin; ++i)
        shapes.emplace_back(random.between(1, 70), random.between(1, 40));
      if (bytes == 37 || bytes == 64) {
        for (int rows = 1; rows <= 70; rows += thin)
          for (int tokens = 1; tokens <= 40; tokens += thin)
            shapes.emplace_back(rows, tokens);
      }
      for (const auto& [rows, tokens] : shapes) {
        const size_t gap = gaps[random.below(8)];
        const bool at_end = random.below(4) != 0;
        const size_t shift = random.below(64);
        for (Tested& t : tested)
          run(t, c, rows, tokens, gap, at_end, shift, true, arenas);
      }
    }
  }
  // As long as a segment may be: no sum may overflow.
  for (int format = 0; format < kFormats && thin == 1; ++format) {
    const size_t bytes = format == kByte ? 1 << 16 : (1 << 20) - 5;
    const Sizes most = {static_cast<Format>(format), bytes, 5, 2};
    const Case c(most, bytes * most.planes(), kExtreme, random);
    for (Tested& t : tested)
      for (int tokens = 1; tokens <= 2; ++tokens)
        run(t, c, 5, tokens, 0, true, 0, true, arenas);
  }
}

class Garbage : public Case {
 public:
  using Case::Case;
  void spoil(Random& random) {
    uint8_t* bytes = const_cast<uint8_t*>(row(0));
    for (size_t i = 0; i < most().rows * most().bytes; ++i)
      bytes[i] = random.below(256);
  }
};

void fuzz(std::vector<Tested>& tested, const Arenas& arenas, long count,
          uint64_t seed) {
  Random random(seed);
  for (long i = 0; i < count; ++i) {
    const bool large = random.below(100) == 0;
    const Sizes most = {static_cast<Format>(random.below(kFormats)),
                        static_cast<size_t>(
                            random.between(1, large ? 1500 : 140)),
                        random.between(1, large ? 70 : 19),
                        random.between(1, random.below(4) ? 3 : 9)};
    const int planes = most.planes();
    const bool valid = random.below(2);
    const size_t inputs = most.bytes * planes - random.below(planes);
    Garbage c(most, inputs, static_cast<Data>(random.below(kDatas)), random);
    if (!valid) c.spoil(random);
    const size_t gap = random.below(2) ? 0 : random.below(100);
    const bool at_end = random.below(4) != 0;
    const size_t shift = random.below(64);
    for (Tested& t : tested) {
      // Every byte is valid where a digit is a byte, but its sums are others.
      run(t, c, most.rows, most.tokens, gap, at_end, shift, valid, arenas);
    }
  }
}

bool print(const std::vector<Tested>& tested) {
  bool good = true;
  for (const Tested& t : tested) {
    for (int format = 0; format < kFormats; ++format) {
      const auto line = [&](const char* what, const Count& count) {
        if (!count.calls) return;
        std::printf("%-10s %-9s %-10s %8ld calls %10ld dots %6ld wrong",
                    t.kernel->name, what, kNames[format], count.calls,
                    count.dots, count.wrong);
        if (count.most) std::printf("  error %.2f eps", count.most);
        std::printf("\n");
        good = good && count.wrong == 0;
      };
      line("dot_int8", t.int8[format]);
      line("dot_tiles", t.tiles[format]);
      line("dot_float", t.real[format]);
    }
  }
  return good;
}

std::vector<Tested> kernels() {
  std::vector<Tested> all;
  for (const Kernel* kernel : testing::machine_kernels())
    all.push_back({kernel, {}, {}, {}});
  return all;
}

// Of this thread alone.
double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// The fastest of some turns: others may use this machine.
void bench(const std::vector<Tested>& tested, int only) {
  const int rows = 512, inputs = 4096;
  Random random(3);
  for (int format = 0; format < kFormats; ++format) {
    const int planes = kDigitsPerByte[format];
    const size_t bytes = (inputs + planes - 1) / planes;
    const Sizes s = {static_cast<Format>(format), bytes, rows, 64};
    std::vector<uint8_t> packed(rows * bytes);
    for (uint8_t& byte : packed) {
      int digits[5];
      for (int& digit : digits) digit = random.below(3);
      byte = pack(s.format, digits);
    }
    const Guarded x(64 * s.segment()), reals(8 * s.segment() * 4),
        out(rows * 64 * 4), scratch(scratch_size(s)), tiles(64 * s.segment());
    for (size_t i = 0; i < 64 * s.segment(); ++i) x.first()[i] = i % 200 - 100;
    float* f = reinterpret_cast<float*>(reals.first());
    for (size_t i = 0; i < 8 * s.segment(); ++i) f[i] = i % 200 - 99.5f;
    const Rows r = {packed.data(), bytes, bytes, rows};
    for (const int tokens : {1, 2, 4, 8, 32, 64}) {
      if (only && tokens != only) continue;
      const int kinds = 3;
      std::vector<std::vector<double>> times(tested.size() * kinds);
      for (int turn = 0; turn < 15; ++turn) {
        for (size_t k = 0; k < times.size(); ++k) {
          const Kernel& kernel = *tested[k / kinds].kernel;
          const int kind = k % kinds;
          if (kind == 1 && !(tokens > 1 && kernel.dot_tiles[format])) continue;
          if (kind == 2 && (format == kByte || tokens > 8)) continue;
          if (!std::strcmp(kernel.name, "portable") &&
              (turn > 2 || tokens > 4))
            continue;
          const double start = seconds_now();
          int calls = 0;
          double seconds;
          do {
            uint8_t* free = reinterpret_cast<uint8_t*>(scratch.first());
            int32_t* y = reinterpret_cast<int32_t*>(out.first());
            const int8_t* q = reinterpret_cast<int8_t*>(x.first());
            if (kind == 0) {
              kernel.dot_int8[format](r, {q, s.plane(), s.segment(), tokens},
                                      y, free);
            } else if (kind == 1) {
              int8_t* t = reinterpret_cast<int8_t*>(tiles.first());
              kernel.interleave(q, s.segment(), s.segment(), tokens, t);
              kernel.dot_tiles[format](r, t, s.plane(), tokens, y, free);
            } else {
              kernel.dot_float[format](r, {f, s.plane(), s.segment(), tokens},
                                       reinterpret_cast<float*>(y), free);
            }
            ++calls;
            seconds = seconds_now() - start;
          } while (seconds < 2e-3);
          times[k].push_back(seconds / calls);
        }
      }
      for (size_t k = 0; k < times.size(); ++k) {
        if (times[k].empty()) continue;
        const double time = *std::min_element(times[k].begin(), times[k].end());
        const char* what[] = {"dot_int8", "dot_tiles", "dot_float"};
        std::printf("%-10s %-9s %-10s M %2d  %8.2f us %6.2f GB/s %7.1f GOP/s\n",
                    tested[k / kinds].kernel->name, what[k % kinds],
                    kNames[format], tokens, time * 1e6,
                    packed.size() / time / 1e9,
                    2.0 * rows * inputs * tokens / time / 1e9);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string mode = argc > 1 ? argv[1] : "all";
  const Arenas arenas;
  std::vector<Tested> tested = kernels();
  bool good = true;
  if (mode == "bench") {
    bench(tested, argc > 2 ? std::atoi(argv[2]) : 0);
    return 0;
  }
  // Under an emulator or a sanitizer a thinner sweep shows the same.
  const char* thin = std::getenv("THIN");
  if (mode == "all" || mode == "sweep")
    sweep(tested, arenas, thin ? std::atoi(thin) : 1);
  if (mode == "all" || mode == "fuzz") {
    fuzz(tested, arenas, argc > 2 ? std::atol(argv[2]) : 10000,
         argc > 3 ? std::atol(argv[3]) : 1);
  }
  good = print(tested);
  if (mode == "all") good = test_team(1) && good;
  if (mode == "team")
    good = test_team(argc > 2 ? std::atoi(argv[2]) : 1) && good;
  std::printf(good ? "good\n" : "WRONG\n");
  return good ? 0 : 1;
}
