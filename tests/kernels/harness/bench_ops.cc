// SPDX-License-Identifier: Apache-2.0
// Speed of `attend` on one core: `make bench-ops`. The best of
// some rounds (first argument); the second argument picks a table.
#include <time.h>

#include "ops_testing.h"

namespace {

struct Shape {
  const char* name;
  int tokens, heads, width, layers, kv_heads;
  int64_t start, slots;
  tritera::CacheType type;
};

constexpr Shape kShapes[] = {
    {"decode 1.1B at 60", 1, 8, 64, 22, 4, 60, 1024, tritera::kBfloat16},
    {"decode 1.1B at 960", 1, 8, 64, 22, 4, 960, 1024, tritera::kBfloat16},
    {"decode 1.1B at 960 int8", 1, 8, 64, 22, 4, 960, 1024, tritera::kInt8},
    {"decode 1.1B at 4000", 1, 8, 64, 22, 4, 4000, 4096, tritera::kBfloat16},
    {"decode heads 4 width 128", 1, 4, 128, 22, 8, 960, 1024,
     tritera::kBfloat16},
    {"decode heads 1 width 64", 1, 1, 64, 22, 16, 960, 1024,
     tritera::kBfloat16},
    {"prefill 256 at 0", 256, 8, 64, 1, 4, 0, 1024, tritera::kBfloat16},
    {"prefill 256 at 256", 256, 8, 64, 1, 4, 256, 1024, tritera::kBfloat16},
    {"prefill 64 at 448", 64, 8, 64, 1, 4, 448, 1024, tritera::kBfloat16},
    {"prefill 64 at 448 int8", 64, 8, 64, 1, 4, 448, 1024, tritera::kInt8},
    {"prefill 128 heads 1", 128, 1, 128, 1, 4, 384, 1024, tritera::kBfloat16},
};

// Caches of all layers and heads, as a decoder walks over them.
class Bench {
 public:
  Bench(const Shape& shape, const tritera::Ops& ops)
      : s_(shape),
        ops_(ops),
        parts_(s_.layers * s_.kv_heads),
        bytes_(s_.width * s_.slots * (s_.type == tritera::kInt8 ? 1 : 2)),
        k_(parts_ * bytes_, 0x3c),
        v_(parts_ * bytes_, 0x3c),
        scale_(s_.slots, 0.01f),
        q_(s_.tokens * s_.heads * s_.width, 0.5f),
        y_(q_.size()),
        scratch_(ops.attend_scratch(s_.tokens, s_.heads, s_.width, s_.slots)) {}

  double seconds() {
    double begin = now();
    size_t stride = s_.heads * s_.width;
    for (int i = 0; i < parts_; ++i)
      ops_.attend({q_.get(), stride, s_.tokens, s_.heads, s_.width, s_.start,
                   k_.get() + i * bytes_, v_.get() + i * bytes_, scale_.get(),
                   scale_.get(), s_.slots, s_.type, y_.get(), stride,
                   scratch_.get()});
    return now() - begin;
  }

  // Only products that the causal mask leaves.
  double flops() const {
    double seen = s_.tokens * (s_.start + (s_.tokens + 1) / 2.0);
    return 4.0 * parts_ * s_.heads * s_.width * seen;
  }

 private:
  // Of this thread, since others may want the core.
  static double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
  }

  Shape s_;
  const tritera::Ops& ops_;
  int parts_;
  size_t bytes_;
  testing::Block<uint8_t> k_, v_;
  testing::Block<float> scale_, q_, y_, scratch_;
};

}  // namespace

int main(int argc, char** argv) {
  int rounds = argc > 1 ? atoi(argv[1]) : 7;
  for (const Shape& shape : kShapes) {
    printf("%-26s", shape.name);
    for (const auto& [name, ops] : testing::tables()) {
      if (argc > 2 && name != argv[2]) continue;
      Bench bench(shape, *ops);
      double best = 1e9;
      for (int round = 0; round < rounds; ++round)
        best = std::min(best, bench.seconds());
      printf("  %s %8.3f ms %6.1f GF/s", name.c_str(), best * 1e3,
             bench.flops() / best * 1e-9);
    }
    printf("\n");
  }
}
