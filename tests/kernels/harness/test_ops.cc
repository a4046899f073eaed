// SPDX-License-Identifier: Apache-2.0
// Every table of `Ops` against plain references; `make ops`.
#include "ops_testing.h"

namespace testing {
namespace {

using tritera::Planes;

Planes planes_of(int segments, int planes, size_t inputs) {
  size_t bytes = (inputs + planes - 1) / planes;
  return {segments, planes, inputs, bytes, (bytes + 63) / 64 * 64};
}

std::vector<float> hard_row(Random& random, size_t n, int kind) {
  std::vector<float> x = random.normals(n);
  size_t at = random.integer(0, n - 1);
  switch (kind) {
    case 1: x[at] = kNan; break;
    case 2: x[at] = random.integer(0, 1) ? kInf : -kInf; break;
    case 3: std::fill(x.begin(), x.end(), at % 2 ? -0.0f : 0.0f); break;
    case 4: for (float& v : x) v *= 1e-40f; break;  // denormal
    case 5: for (float& v : x) v *= 1e38f / 6; break;
    case 6:  // ties
      for (float& v : x) v = random.integer(-127, 126) + 0.5f;
      x[at] = 127;
      break;
    case 7: x[at] = 1e6f; break;
    case 8: for (float& v : x) v *= 1e-30f; break;
    case 9: x[at] = 1e-30f; for (float& v : x) v = std::min(v, 1e-30f); break;
    case 10: x[at] = -kNan; break;
  }
  return x;
}
constexpr int kKinds = 11;

size_t planar(const Planes& planes, size_t input) {
  size_t segment = input / planes.inputs, within = input % planes.inputs;
  return segment * planes.segment() + within / planes.bytes * planes.plane +
         within % planes.bytes;
}

void test_quantize(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(1);
  for (int trial = 0; trial < 3000; ++trial) {
    int counts[] = {1, 4, 5};
    size_t most = trial % 50 ? 330 : 6000;
    Planes planes = planes_of(random.integer(1, 4), counts[trial % 3],
                              random.integer(1, most));
    size_t n = planes.segments * planes.inputs;
    std::vector<float> x = hard_row(random, n, trial % kKinds);
    Quantized wanted = quantized(x);
    // What follows the last segment is not written.
    const size_t values = planes.segments * planes.segment();
    std::vector<int8_t> q(values, 0);
    std::vector<float> spread(values, 0);
    std::vector<int32_t> sums(planes.segments, 0);
    for (size_t i = 0; i < n; ++i) {
      q[planar(planes, i)] = wanted.q[i];
      spread[planar(planes, i)] = x[i];
      sums[i / planes.inputs] += wanted.q[i];
    }
    Block<float> input(x), got_spread(values, 7);
    Block<int8_t> got(values, 99);
    Block<int32_t> got_sums(planes.segments, 7);
    float scale = ops.quantize(input.get(), planes, got.get(), got_sums.get());
    ops.spread(input.get(), planes, got_spread.get());
    tally.equal(name + " quantize q", !memcmp(got.get(), q.data(), q.size()));
    tally.equal(name + " quantize scale", same_bits(scale, wanted.scale));
    tally.equal(name + " quantize sums",
                !memcmp(got_sums.get(), sums.data(), 4 * sums.size()));
    bool same = true;
    for (size_t i = 0; i < values; ++i)
      same = same && same_bits(got_spread[i], spread[i]);
    tally.equal(name + " spread", same);
  }
}

// |got - wanted| in float32 ulps of `wanted`; 0 where both are NaN.
double ulps(float got, double wanted) {
  if (isnan(wanted) || isinf(static_cast<float>(wanted)))
    return same_bits(got, wanted) ? 0 : kInf;
  double ulp = ldexp(1, -149);
  if (wanted != 0) ulp = std::max(ulp, ldexp(1, ilogb(wanted) - 23));
  return fabs(got - wanted) / ulp;
}

void test_rms_norm(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(2);
  for (int trial = 0; trial < 700; ++trial) {
    size_t n = trial < 600 ? trial / 2 + 1 : random.integer(1000, 14000);
    int kinds[] = {0, 0, 0, 7, 3, 1, 10, 4};
    int kind = kinds[trial % 8];
    std::vector<float> x = hard_row(random, n, kind);
    if (trial % 16 == 0)
      for (float& value : x) value = fabs(value);
    std::vector<float> gain = random.normals(n);
    Block<float> input(x), gains(gain), y(n);
    float epsilon = trial % 3 ? 1e-5f : 1e-6f;
    ops.rms_norm(input.get(), gains.get(), n, epsilon, y.get());
    Block<float> in_place(x);
    ops.rms_norm(in_place.get(), gains.get(), n, epsilon, in_place.get());
    bool same = true;
    for (size_t i = 0; i < n; ++i) same = same && same_bits(in_place[i], y[i]);
    tally.equal(name + " rms_norm in place", same);
    double sum = 0;
    for (float value : x) sum += static_cast<double>(value) * value;
    double factor = 1 / sqrt(sum / n + epsilon), most = 0;
    for (size_t i = 0; i < n; ++i)
      most = std::max(most, ulps(y[i], x[i] * factor * gain[i]));
    tally.error(name + " rms_norm / 4 ulp", most / 4);
  }
  Block<float> x(5, 1), y(5);  // an infinity is never a number
  x[3] = kInf;
  ops.rms_norm(x.get(), x.get(), 5, 1e-5f, y.get());
  tally.equal(name + " rms_norm inf", isnan(y[3]));
}

void test_silu(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(3);
  for (int trial = 0; trial < 600; ++trial) {
    size_t n = trial < 500 ? trial / 2 + 1 : 8000;
    std::vector<float> gate = random.normals(n, trial % 2 ? 3 : 30);
    std::vector<float> up = random.normals(n);
    const float edges[] = {0,     -0.0f, 1e-40f, 88,   -88,   -88.6f, -87,
                           -1000, 1000,  kNan,   kInf, -kInf, 89,     3e38f};
    for (float edge : edges) gate[random.integer(0, n - 1)] = edge;
    Block<float> gates(gate), ups(up), y(n);
    ops.gated[tritera::kSilu](gates.get(), ups.get(), n, y.get());
    double most = 0;
    for (size_t i = 0; i < n; ++i) {
      double g = gate[i], wanted = g / (1 + exp(-g)) * up[i];
      // Past e^88.7 the quotient is 0 in float32.
      if (g < -88) {
        tally.equal(name + " silu ends",
                    isinf(g) ? isnan(y[i]) : fabs(y[i]) < 1e-35);
      } else {
        most = std::max(most, ulps(y[i], wanted));
      }
    }
    tally.error(name + " silu / 5 ulp", most / 5);
  }
}

void test_relu2(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(6);
  for (int trial = 0; trial < 600; ++trial) {
    size_t n = trial < 500 ? trial / 2 + 1 : 8000;
    std::vector<float> gate = random.normals(n, trial % 2 ? 3 : 30);
    std::vector<float> up = random.normals(n);
    const float edges[] = {0,    -0.0f, 1e-40f, -1e-40f, 1e-20f, 1e19f,
                           1e20f, -1e20f, kNan, -kNan, kInf, -kInf};
    for (float edge : edges) gate[random.integer(0, n - 1)] = edge;
    Block<float> gates(gate), ups(up), y(n);
    ops.gated[tritera::kRelu2](gates.get(), ups.get(), n, y.get());
    bool same = true;
    for (size_t i = 0; i < n; ++i) {
      // Both products are rounded: the double of a square is exact.
      const double g = gate[i] <= 0 ? 0 : gate[i];
      const float square = static_cast<float>(g * g);
      const float wanted =
          static_cast<float>(static_cast<double>(square) * up[i]);
      same = same && same_bits(y[i], wanted);
    }
    tally.equal(name + " relu2", same);
  }
}

void test_rotate(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(4);
  for (int trial = 0; trial < 600; ++trial) {
    int width = trial < 256 ? trial / 2 * 2 + 2 : 2 * random.integer(1, 128);
    int heads = random.integer(1, 9), half = width / 2;
    std::vector<float> x = random.normals(heads * width), angle(half);
    if (trial % 5 == 0) x[random.integer(0, x.size() - 1)] = kNan;
    Block<float> turned(x), cosines(half), sines(half);
    for (int i = 0; i < half; ++i) {
      angle[i] = random.normal() * 3;
      cosines[i] = cosf(angle[i]);
      sines[i] = sinf(angle[i]);
    }
    ops.rotate(turned.get(), heads, width, cosines.get(), sines.get());
    double most = 0;
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < half; ++i) {
        size_t at = head * width + i;
        double a = x[at], b = x[at + half], c = cosines[i], s = sines[i];
        double allowed = ldexp(hypot(a, b), -23);
        if (isnan(allowed)) {
          bool nan = isnan(turned[at]) && isnan(turned[at + half]);
          tally.equal(name + " rotate NaN", nan);
          continue;
        }
        most = std::max({most, fabs(turned[at] - (a * c - b * s)) / allowed,
                         fabs(turned[at + half] - (b * c + a * s)) / allowed});
      }
    }
    tally.error(name + " rotate", most);
  }
}

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (isnan(x)) return bits >> 16 | 0x40;
  uint32_t rest = bits & 0xffff, up = bits >> 16;
  if (rest > 0x8000 || (rest == 0x8000 && up % 2)) ++up;
  return up;
}

template <class T>
void test_store(const std::string& name, const Ops& ops, Tally& tally) {
  Random random(5);
  bool int8 = sizeof(T) == 1;
  for (int trial = 0; trial < 600; ++trial) {
    int width = 2 * random.integer(1, 128), slots = random.integer(1, 70);
    int64_t slot = random.integer(0, slots - 1);
    std::vector<float> rows[2];
    for (int i = 0; i < 2; ++i)
      rows[i] = hard_row(random, width, (trial + i) % kKinds);
    size_t n = static_cast<size_t>(width) * slots;
    Block<T> cache[2] = {Block<T>(n, 77), Block<T>(n, 77)};
    Block<float> scale[2] = {Block<float>(slots, 7), Block<float>(slots, 7)};
    Block<float> k(rows[0]), v(rows[1]);
    ops.store_kv(k.get(), v.get(), width, slots, slot,
                 int8 ? tritera::kInt8 : tritera::kBfloat16, cache[0].get(),
                 cache[1].get(), int8 ? scale[0].get() : nullptr,
                 int8 ? scale[1].get() : nullptr);
    for (int i = 0; i < 2; ++i) {
      Quantized wanted = quantized(rows[i]);
      bool same = true;
      for (int c = 0; c < width; ++c) {
        for (int s = 0; s < slots; ++s) {
          T got = cache[i][i ? s * width + c : c * slots + s];
          T value = int8 ? wanted.q[c] : to_bfloat16(rows[i][c]);
          same = same && got == (s == slot ? value : 77);
        }
      }
      for (int s = 0; int8 && s < slots; ++s)
        same = same && same_bits(scale[i][s], s == slot ? wanted.scale : 7);
      tally.equal(name + (int8 ? " store int8" : " store bfloat16"), same);
    }
  }
}

}  // namespace
}  // namespace testing

// The argument is how many cases of attention there are of each kind.
int main(int argc, char** argv) {
  int trials = argc > 1 ? atoi(argv[1]) : 300;
  testing::Tally tally;
  for (const auto& [name, ops] : testing::tables()) {
    if (!ops) {
      tally.equal(name + " exists", false);
      continue;
    }
    testing::test_quantize(name, *ops, tally);
    testing::test_rms_norm(name, *ops, tally);
    testing::test_silu(name, *ops, tally);
    testing::test_relu2(name, *ops, tally);
    testing::test_rotate(name, *ops, tally);
    testing::test_store<int8_t>(name, *ops, tally);
    testing::test_store<uint16_t>(name, *ops, tally);
    testing::test_attend(name, *ops, trials, tally);
  }
  return tally.report() ? 1 : 0;
}
