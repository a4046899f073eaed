// SPDX-License-Identifier: Apache-2.0
// `Ops::attend` against float64.
#include "ops_testing.h"

namespace testing {
namespace {

struct Shape {
  int tokens, heads, width;
  int64_t start, slots;
};

template <class T>
struct Case {
  Shape shape;
  size_t q_stride, y_stride;
  std::vector<float> q, y;
  Block<T> k, v;
  Block<float> k_scale, v_scale;

  static constexpr bool kIsInt8 = sizeof(T) == 1;

  Case(Random& random, const Shape& s, float scale)
      : shape(s),
        q_stride(s.heads * s.width + random.integer(0, 5)),
        y_stride(s.heads * s.width + random.integer(0, 5)),
        q(random.normals(q_stride * s.tokens, scale)),
        y(y_stride * s.tokens, 7),
        k(s.width * s.slots),
        v(s.width * s.slots),
        k_scale(kIsInt8 ? s.slots : 0, kNan),
        v_scale(kIsInt8 ? s.slots : 0, kNan) {
    // What nothing wrote may be anything.
    for (size_t i = 0; i < k.size(); ++i) k[i] = v[i] = kIsInt8 ? 127 : 0x7fff;
  }

  void put(const Ops& ops, int64_t slot, const std::vector<float>& key,
           const std::vector<float>& value) {
    ops.store_kv(key.data(), value.data(), shape.width, shape.slots, slot,
                 kIsInt8 ? tritera::kInt8 : tritera::kBfloat16, k.get(),
                 v.get(), k_scale.get(), v_scale.get());
  }

  void run(const Ops& ops) {
    size_t floats = ops.attend_scratch(shape.tokens, shape.heads, shape.width,
                                       shape.start + shape.tokens);
    Block<float> scratch(floats, kNan);  // any content will do
    Block<float> queries(q), out(y);
    ops.attend({queries.get(), q_stride, shape.tokens, shape.heads, shape.width,
                shape.start, k.get(), v.get(),
                kIsInt8 ? k_scale.get() : nullptr,
                kIsInt8 ? v_scale.get() : nullptr, shape.slots,
                kIsInt8 ? tritera::kInt8 : tritera::kBfloat16, out.get(),
                y_stride, scratch.get()});
    std::copy(out.get(), out.get() + y.size(), y.begin());
  }

  double key(int c, int64_t slot) const {
    T x = k[c * shape.slots + slot];
    if constexpr (kIsInt8) return static_cast<double>(x) * k_scale[slot];
    return from_bfloat16(x);
  }
  double value(int c, int64_t slot) const {
    T x = v[slot * shape.width + c];
    if constexpr (kIsInt8) return static_cast<double>(x) * v_scale[slot];
    return from_bfloat16(x);
  }

  void check(const std::string& name, Tally& tally) const {
    for (size_t i = 0; i < y.size(); ++i) {
      if (i % y_stride >= static_cast<size_t>(shape.heads * shape.width))
        tally.equal(name + " gaps", y[i] == 7);
    }
    for (int t = 0; t < shape.tokens; ++t)
      for (int head = 0; head < shape.heads; ++head)
        tally.error(name, error(t, head), describe(t, head).c_str());
  }

  std::string describe(int t, int head) const {
    char text[200];
    snprintf(text, sizeof text, "token %d/%d head %d/%d width %d start %ld", t,
             shape.tokens, head, shape.heads, shape.width,
             static_cast<long>(shape.start));
    return text;
  }

  // The greatest of a row, in units of what rounding allows.
  double error(int t, int head) const {
    const float* query = q.data() + t * q_stride + head * shape.width;
    const float* got = y.data() + t * y_stride + head * shape.width;
    int64_t seen = shape.start + t + 1;
    std::vector<double> weight(seen);
    double most = -HUGE_VAL, sizes = 0, total = 0;
    for (int64_t slot = 0; slot < seen; ++slot) {
      double sum = 0, size = 0;
      for (int c = 0; c < shape.width; ++c) {
        double product = query[c] * key(c, slot) / sqrt(shape.width);
        sum += product;
        size += fabs(product);
      }
      weight[slot] = sum;
      most = isnan(sum) ? NAN : std::max(most, sum);
      sizes = std::max(sizes, size);
    }
    for (double& w : weight) total += w = exp(w - most);
    double worst = 0;
    for (int c = 0; c < shape.width; ++c) {
      double sum = 0, size = 0, denormal = 0;
      for (int64_t slot = 0; slot < seen; ++slot) {
        sum += weight[slot] / total * value(c, slot);
        size += weight[slot] / total * fabs(value(c, slot));
        denormal += ldexp(fabs(value(c, slot)), -149);
      }
      // A score past float32, in powers of two, makes a NaN, too.
      if (isnan(got[c]) && sizes > 2e38) continue;
      if (isnan(sum) || isinf(sum)) {
        if (!isnan(got[c]) && !same_bits(got[c], sum)) return kInf;
        continue;
      }
      double allowed = ldexp(8 + 4 * sizes, -23) * size + denormal + 1e-38;
      double error = fabs(got[c] - sum) / allowed;
      worst = std::max(worst, isnan(error) ? kInf : error);
    }
    return worst;
  }
};

template <class T>
void test_cases(const std::string& name, const Ops& ops, int trials,
                Tally& tally) {
  Random random(6);
  const int64_t starts[] = {0,   1,   7,   15,  16,  31,  32, 33,
                            100, 254, 255, 256, 257, 511, 700};
  for (int trial = 0; trial < trials; ++trial) {
    Shape shape;
    shape.width = 2 * random.integer(1, trial % 3 ? 36 : 128);
    if (trial % 4 == 0) shape.width = trial % 8 ? 64 : 128;
    shape.tokens = trial % 2 ? 1 : random.integer(1, 70);
    shape.heads = random.integer(1, shape.tokens > 30 ? 3 : 12);
    shape.start = trial % 3 ? starts[random.integer(0, 14)]
                            : random.integer(0, 90);
    shape.slots = shape.start + shape.tokens + random.integer(0, 40);
    Case<T> test(random, shape, trial % 7 == 0 ? 30 : 1);
    // Something that may be no number, somewhere.
    int64_t seen = shape.start + shape.tokens;
    int64_t odd = trial % 5 ? -1 : random.integer(0, seen - 1);
    const float strange[] = {kNan, kInf, -kInf, 3e38f, 0};
    for (int64_t slot = 0; slot < seen; ++slot) {
      auto key = random.normals(shape.width);
      auto value = random.normals(shape.width);
      if (slot == odd) {
        float x = strange[random.integer(0, 4)];
        auto& row = random.integer(0, 1) ? key : value;
        if (x == 0)
          std::fill(row.begin(), row.end(), 0);
        else
          row[random.integer(0, shape.width - 1)] = x;
      }
      test.put(ops, slot, key, value);
    }
    if (trial % 11 == 0) {
      const float x[] = {kNan, kInf, -kInf};
      test.q[random.integer(0, test.q.size() - 1)] = x[random.integer(0, 2)];
    }
    if (trial % 13 == 0) std::fill(test.q.begin(), test.q.end(), 0);
    test.run(ops);
    test.check(name, tally);
  }
}

}  // namespace

void test_attend(const std::string& name, const Ops& ops, int trials,
                 Tally& tally) {
  test_cases<uint16_t>(name + " attend bfloat16", ops, trials, tally);
  test_cases<int8_t>(name + " attend int8", ops, trials, tally);
}

}  // namespace testing
