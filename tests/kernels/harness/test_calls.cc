// SPDX-License-Identifier: Apache-2.0
// The drivers above the kernels, by every kernel and several teams of threads.
//
//   test_calls [CASES [SEED]]
#include <cstring>
#include <memory>

#include "decoder.h"
#include "machine.h"
#include "oracle.h"
#include "pool.h"

namespace testing {
namespace {

using tritera::Batch;
using tritera::Cache;
using tritera::Kernel;
using tritera::LayerWeights;
using tritera::Matrix;
using tritera::Product;
using tritera::Team;

// The first one has no helpers: its bits are those that all must have.
class Crews {
 public:
  Crews() {
    add(0, 0, 0);
    add(1, 1, 0);
    add(3, 3, 0);
    add(2, 2, 300);  // late
    add(0, 2, 0);    // that never start
  }
  size_t count() const { return helpers_.size(); }
  const tritera::Helpers& operator[](size_t i) const { return helpers_[i]; }
  const tritera::Helpers& any(Random& random) const {
    return helpers_[random.integer(1, count() - 1)];
  }

 private:
  void add(int threads, int told, int delay_us) {
    pools_.push_back(std::make_unique<Pool>(threads, delay_us));
    helpers_.push_back(pools_.back()->helpers(told));
  }
  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<tritera::Helpers> helpers_;
};

struct Setting {
  const Kernel& kernel;
  const Crews& crews;
  Tally& tally;

  std::string name(const char* what) const {
    return std::string(kernel.name) + " " + what;
  }
};

bool same(const Block<float>& a, const Block<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!same_bits(a[i], b[i])) return false;
  return true;
}

template <class T>
T pick(Random& random, std::initializer_list<T> from) {
  return from.begin()[random.integer(0, from.size() - 1)];
}

// Sizes at the edges of blocks of tokens, panels and chunks, and others.
int64_t some_tokens(Random& random) {
  return random.integer(0, 2) ? pick<int64_t>(random, {1, 1, 2, 3, 4, 7, 8, 9,
                                                       15, 16, 17, 31, 32, 33,
                                                       64, 65, 255, 256, 257,
                                                       300})
                              : random.integer(1, 40);
}

int64_t some_length(Random& random) {
  return random.integer(0, 2)
             ? pick<int64_t>(random, {1, 2, 3, 4, 5, 6, 31, 32, 33, 63, 64, 65,
                                      127, 128, 129, 192, 255, 256, 257, 320})
             : random.integer(1, 700);
}

Weights some_weights(Random& random, Format format, int64_t outputs,
                     int64_t inputs, bool along_inputs, int blocks) {
  const int64_t length = along_inputs ? inputs : outputs;
  return {format, outputs, inputs, length % blocks ? 1 : blocks, along_inputs,
          random};
}

std::vector<float> some_tokens_of(Random& random, int64_t tokens,
                                  int64_t inputs) {
  std::vector<float> x = random.normals(tokens * inputs);
  if (random.integer(0, 2) == 0)  // a token that is no number
    x[random.integer(0, x.size() - 1)] = random.integer(0, 1) ? kNan : -kNan;
  if (random.integer(0, 4) == 0)
    x[random.integer(0, x.size() - 1)] = 1e5f;
  if (random.integer(0, 9) == 0)
    std::fill_n(x.begin() + random.integer(0, tokens - 1) * inputs, inputs, 0);
  return x;
}

// One to three products side by side, in rows that are longer than they are.
void test_multiply(Random& random, bool large,
                   const std::vector<Setting>& settings) {
  const bool int8 = random.integer(0, 2);
  const Format format =
      static_cast<Format>(random.integer(0, int8 ? 2 : 1));
  const int blocks = pick(random, {1, 1, 2, 3, 6});
  const bool along = random.integer(0, 1);
  const int count = random.integer(1, 3);
  const int64_t M = large ? random.integer(1, 300) : some_tokens(random);
  int64_t K = large ? random.integer(700, 3000) : some_length(random);
  if (M * K > 40000 && !large) K = random.integer(1, 130);
  if (along) K = (K + blocks - 1) / blocks * blocks;
  std::vector<Weights> weights;
  weights.reserve(count);
  int64_t width = 0;
  for (int i = 0; i < count; ++i) {
    int64_t N = large ? random.integer(1, 90) : some_length(random) % 330 + 1;
    if (!along && random.integer(0, 1)) N = (N + blocks - 1) / blocks * blocks;
    weights.push_back(some_weights(random, format, N, K, along,
                                   along || random.integer(0, 4) ? blocks : N));
    width += N;
  }
  const int64_t stride = width + random.integer(0, 5);
  const Block<float> x(some_tokens_of(random, M, K));
  const Block<float> residual(random.normals(M * stride));
  const bool add = random.integer(0, 1), in_place = random.integer(0, 1);
  const bool copies = random.integer(0, 1);
  const tritera::Source source = [&](int64_t t, float* row) {
    if (!copies) return static_cast<const float*>(&x[t * K]);
    std::copy_n(&x[t * K], K, row);
    return static_cast<const float*>(row);
  };
  std::vector<Oracle> oracles;
  for (const Weights& w : weights) oracles.emplace_back(w, x.get(), M, int8);
  for (const Setting& setting : settings) {
    const auto run = [&](const tritera::Helpers& helpers, Block<float>& y) {
      for (size_t i = 0; i < y.size(); ++i)
        y[i] = add && in_place ? residual[i] : 7;
      std::vector<Product> products;
      int64_t at = 0;
      for (const Weights& w : weights) {
        const float* from = in_place ? y.get() : residual.get();
        products.push_back(
            {w.matrix(), {y.get() + at, stride, add ? from + at : nullptr}});
        at += w.outputs;
      }
      Team team(helpers);
      tritera::multiply(team, setting.kernel, M, int8, source, products.data(),
                        count);
    };
    Block<float> y(M * stride), others(M * stride);
    run(setting.crews[0], y);
    run(setting.crews.any(random), others);
    setting.tally.equal(setting.name("threads"), same(y, others));
    double most = 0;
    bool gaps = true;
    for (int64_t t = 0; t < M; ++t) {
      int64_t at = t * stride;
      for (int i = 0; i < count; ++i)
        for (int64_t n = 0; n < weights[i].outputs; ++n, ++at)
          most = std::max(
              most, oracles[i].error(t, n, y[at],
                                     add ? &residual[at] : nullptr));
      for (; at < (t + 1) * stride; ++at)
        gaps = gaps && y[at] == (add && in_place ? residual[at] : 7);
    }
    char what[200];
    snprintf(what, sizeof what,
             "M %ld K %ld N %ld and %d more, format %d, %d scales along %s",
             long(M), long(K), long(weights[0].outputs), count - 1, format,
             blocks, along ? "inputs" : "outputs");
    setting.tally.error(setting.name(int8 ? "multiply int8" : "multiply float"),
                        most, what);
    setting.tally.equal(setting.name("multiply gaps"), gaps, what);
  }
}

// The three that decoders call: what they add to `multiply` are their inputs.
void test_fused(Random& random, const std::vector<Setting>& settings) {
  const bool int8 = random.integer(0, 2);
  const Format format = static_cast<Format>(random.integer(0, int8 ? 2 : 1));
  const int64_t M = some_tokens(random);
  const int64_t K = 6 * random.integer(1, M > 40 ? 12 : 60);
  const int64_t N = random.integer(1, 70);
  const Weights w = some_weights(random, format, N, K, random.integer(0, 1),
                                 pick(random, {1, 2, 3, 6}));
  const Weights second = some_weights(random, format, random.integer(1, 70), K,
                                      w.along_inputs, w.segments());
  const std::vector<float> gate_up = some_tokens_of(random, M, 2 * K);
  const Block<float> x2(gate_up), gain(random.normals(K));
  const Block<float> x(std::vector<float>(gate_up.begin(),
                                          gate_up.begin() + M * K));
  const Block<float> residual(random.normals(M * N));
  const int kind = random.integer(0, 2);
  const bool normed = kind == 0 || random.integer(0, 1);
  const float* gains = normed ? gain.get() : nullptr;
  const auto gate = pick(random, {tritera::kSilu, tritera::kRelu2});
  const bool pair = kind == 0 && second.segments() == w.segments();
  const bool in_place = kind && random.integer(0, 1);
  const int64_t width = pair ? N + second.outputs : N;
  for (const Setting& setting : settings) {
    const auto run = [&](const tritera::Helpers& helpers, Block<float>& y) {
      if (in_place) std::copy_n(residual.get(), y.size(), y.get());
      const float* from = in_place ? y.get() : residual.get();
      const Matrix both[] = {w.matrix(), second.matrix()};
      Team team(helpers);
      const Kernel& kernel = setting.kernel;
      if (kind == 0)
        tritera::norm_multiply(team, kernel, M, int8, x.get(), gains, 1e-5f,
                               both, pair ? 2 : 1, y.get());
      else if (kind == 1)
        tritera::multiply_add(team, kernel, M, int8, x.get(), gains, 1e-5f,
                              both[0], from, y.get());
      else
        tritera::gated_multiply_add(team, kernel, M, int8, x2.get(), gate,
                                    gains, 1e-5f, both[0], from, y.get());
    };
    Block<float> y(M * width), others(M * width), inputs(x.size());
    run(setting.crews[0], y);
    run(setting.crews.any(random), others);
    setting.tally.equal(setting.name("threads"), same(y, others));
    const tritera::Ops& ops = *setting.kernel.ops;
    for (int64_t t = 0; t < M; ++t) {
      float* to = &inputs[t * K];
      if (kind == 2)
        ops.gated[gate](&x2[2 * t * K], &x2[2 * t * K + K], K, to);
      else
        std::copy_n(&x[t * K], K, to);
      if (normed) ops.rms_norm(to, gains, K, 1e-5f, to);
    }
    const Oracle first(w, inputs.get(), M, int8);
    const Oracle last(pair ? second : w, inputs.get(), M, int8);
    double most = 0;
    for (int64_t t = 0; t < M; ++t)
      for (int64_t n = 0; n < width; ++n)
        most = std::max(
            most, n < N ? first.error(t, n, y[t * width + n],
                                      kind ? &residual[t * N + n] : nullptr)
                        : last.error(t, n - N, y[t * width + n]));
    const char* names[] = {"norm_multiply", "multiply_add",
                           "gated_multiply_add"};
    char what[100];
    snprintf(what, sizeof what,
             "M %ld K %ld N %ld int8 %d format %d normed %d gate %d", long(M),
             long(K), long(N), int8, format, normed, gate);
    setting.tally.error(setting.name(names[kind]), most, what);
  }
}

// T: int8_t, or uint16_t for bfloat16.
template <class T>
struct Caches {
  static constexpr bool kIsInt8 = sizeof(T) == 1;
  Block<T> k, v;
  Block<float> k_scale, v_scale;

  Caches(int64_t heads, int64_t width, int64_t slots)
      : k(heads * width * slots, T(0x7fff)), v(k.size(), T(0x7fff)),
        k_scale(kIsInt8 ? heads * slots : 0, kNan),
        v_scale(k_scale.size(), kNan) {}
  void copy(const Caches& from) {
    std::copy_n(from.k.get(), k.size(), k.get());
    std::copy_n(from.v.get(), v.size(), v.get());
    std::copy_n(from.k_scale.get(), k_scale.size(), k_scale.get());
    std::copy_n(from.v_scale.get(), v_scale.size(), v_scale.get());
  }
  bool operator==(const Caches& other) const {
    return !memcmp(k.get(), other.k.get(), k.size() * sizeof(T)) &&
           !memcmp(v.get(), other.v.get(), v.size() * sizeof(T)) &&
           same(k_scale, other.k_scale) && same(v_scale, other.v_scale);
  }
  Cache get() const {
    return {k.get(), v.get(), kIsInt8 ? k_scale.get() : nullptr,
            kIsInt8 ? v_scale.get() : nullptr};
  }
  double key(const tritera::AttentionShape& s, int64_t head, int64_t slot,
             int c) const {
    const T x = k[(head * s.width + c) * s.slots + slot];
    if constexpr (kIsInt8) return double{k_scale[head * s.slots + slot]} * x;
    return from_bfloat16(x);
  }
  double value(const tritera::AttentionShape& s, int64_t head, int64_t slot,
               int c) const {
    const T x = v[(head * s.slots + slot) * s.width + c];
    if constexpr (kIsInt8) return double{v_scale[head * s.slots + slot]} * x;
    return from_bfloat16(x);
  }
  void store(const tritera::Ops& ops, const tritera::AttentionShape& s,
             int64_t head, int64_t slot, const float* key, const float* value) {
    const int64_t at = head * s.width * s.slots;
    ops.store_kv(key, value, s.width, s.slots, slot, s.type, k.get() + at,
                 v.get() + at, kIsInt8 ? &k_scale[head * s.slots] : nullptr,
                 kIsInt8 ? &v_scale[head * s.slots] : nullptr);
  }
};

struct Sequences {
  std::vector<int32_t> start;
  int64_t tokens;
  tritera::AttentionShape shape;

  Sequences(Random& random, bool int8) {
    const int64_t B = random.integer(1, 3);
    const int G = random.integer(1, 3);
    shape = {G * random.integer(1, 4),
             G,
             2 * random.integer(1, 20),
             pick(random, {10000.f, 500000.f}),
             1e-5f,
             int8 ? tritera::kInt8 : tritera::kBfloat16,
             64 * random.integer(1, 4)};
    if (random.integer(0, 3) == 0) shape.width = pick(random, {2, 64, 128});
    tokens = pick<int64_t>(random, {1, 1, 1, 2, 5, 16, 63, 64, 65, 130});
    tokens = std::min(tokens, shape.slots);
    for (int64_t b = 0; b < B; ++b) {
      const int last = shape.slots - tokens;
      start.push_back(random.integer(0, 3) ? random.integer(0, last)
                                           : random.integer(0, 1) * last);
    }
  }
  Batch batch() const {
    return {static_cast<int64_t>(start.size()), tokens, start.data()};
  }
  int64_t count() const { return start.size() * tokens; }
  int64_t cache_heads() const { return start.size() * shape.kv_heads; }
};

// Past keys and values; slots that nothing wrote hold no numbers.
template <class T>
void fill(Random& random, const Sequences& s, Caches<T>& caches) {
  for (size_t b = 0; b < s.start.size(); ++b) {
    for (int g = 0; g < s.shape.kv_heads; ++g) {
      for (int32_t slot = 0; slot < s.start[b]; ++slot) {
        const auto key = random.normals(s.shape.width);
        const auto value = random.normals(s.shape.width);
        caches.store(*tritera::portable_ops(), s.shape,
                     b * s.shape.kv_heads + g, slot, key.data(), value.data());
      }
    }
  }
}

// y of one token and head, in float64; in units of what rounding allows.
template <class T>
double attend_error(const tritera::AttentionShape& s, const Caches<T>& caches,
                    int64_t cache_head, int64_t seen, const float* q,
                    const float* y) {
  std::vector<double> weight(seen);
  double most = -HUGE_VAL, sizes = 0, total = 0;
  for (int64_t slot = 0; slot < seen; ++slot) {
    double sum = 0, size = 0;
    for (int c = 0; c < s.width; ++c) {
      const double product =
          q[c] * caches.key(s, cache_head, slot, c) / std::sqrt(s.width);
      sum += product;
      size += std::fabs(product);
    }
    weight[slot] = sum;
    most = std::isnan(sum) ? NAN : std::max(most, sum);
    sizes = std::max(sizes, size);
  }
  for (double& w : weight) total += w = std::exp(w - most);
  double worst = 0;
  for (int c = 0; c < s.width; ++c) {
    double sum = 0, size = 0;
    for (int64_t slot = 0; slot < seen; ++slot) {
      const double value = caches.value(s, cache_head, slot, c);
      sum += weight[slot] / total * value;
      size += weight[slot] / total * std::fabs(value);
    }
    if (std::isnan(sum)) {
      if (!std::isnan(y[c])) return kInf;
      continue;
    }
    const double allowed = std::ldexp(8 + 4 * sizes, -23) * size + 1e-37;
    const double share = std::fabs(y[c] - sum) / allowed;
    worst = std::max(worst, std::isnan(share) ? kInf : share);
  }
  return worst;
}

template <class T>
void test_attention(Random& random, const std::vector<Setting>& settings) {
  const Sequences s(random, sizeof(T) == 1);
  const auto& shape = s.shape;
  const int H = shape.heads, G = shape.kv_heads, h = shape.width;
  const int64_t M = s.count(), T_ = s.tokens, X = shape.qkv();
  Caches<T> before(s.cache_heads(), h, shape.slots);
  fill(random, s, before);
  const Block<float> qkv(some_tokens_of(random, M, X));
  const Block<float> q_gain(random.normals(h)), k_gain(random.normals(h));
  const bool gains = random.integer(0, 1);
  for (const Setting& setting : settings) {
    const tritera::Ops& ops = *setting.kernel.ops;
    Caches<T> wanted(s.cache_heads(), h, shape.slots);
    wanted.copy(before);
    std::vector<float> q;
    for (int64_t t = 0; t < M; ++t) {
      const int64_t b = t / T_, position = s.start[b] + t % T_;
      std::vector<float> cos, sin, own((H + G) * h);
      for (int i = 0; i < h / 2; ++i) {
        const float angle =
            position * static_cast<float>(std::pow(
                           double{shape.theta}, -static_cast<double>(i) /
                                                    (h / 2)));
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
      }
      for (int i = 0; i < H + G; ++i) {
        const float* from = &qkv[t * X + i * h];
        if (gains)
          ops.rms_norm(from, i < H ? q_gain.get() : k_gain.get(), h,
                       shape.epsilon, &own[i * h]);
        else
          std::copy_n(from, h, &own[i * h]);
      }
      ops.rotate(own.data(), H + G, h, cos.data(), sin.data());
      for (int g = 0; g < G; ++g)
        wanted.store(ops, shape, b * G + g, position, &own[(H + g) * h],
                     &qkv[t * X + (H + G + g) * h]);
      q.insert(q.end(), own.begin(), own.begin() + H * h);
    }
    const auto run = [&](const tritera::Helpers& helpers, Caches<T>& caches,
                         Block<float>& y) {
      caches.copy(before);
      Team team(helpers);
      tritera::attention(team, setting.kernel, s.batch(), shape, qkv.get(),
                         gains ? q_gain.get() : nullptr,
                         gains ? k_gain.get() : nullptr, caches.get(), y.get());
    };
    Caches<T> caches(s.cache_heads(), h, shape.slots);
    Caches<T> other_caches(s.cache_heads(), h, shape.slots);
    Block<float> y(M * H * h), others(M * H * h);
    run(setting.crews[0], caches, y);
    run(setting.crews.any(random), other_caches, others);
    setting.tally.equal(setting.name("threads"),
                        same(y, others) && caches == other_caches);
    const std::string name = setting.name("attention ");
    const char* type = sizeof(T) == 1 ? "int8" : "bfloat16";
    char what[200];
    snprintf(what, sizeof what, "B %zu T %ld H %d G %d h %d S %ld start %d",
             s.start.size(), long(T_), H, G, h, long(shape.slots), s.start[0]);
    setting.tally.equal(name + "cache " + type, caches == wanted, what);
    double most = 0;
    for (int64_t t = 0; t < M; ++t) {
      const int64_t b = t / T_, seen = s.start[b] + t % T_ + 1;
      for (int i = 0; i < H; ++i)
        most = std::max(most, attend_error(shape, wanted, b * G + i / (H / G),
                                           seen, &q[(t * H + i) * h],
                                           &y[(t * H + i) * h]));
    }
    setting.tally.error(name + type, most, what);
  }
}

// A layer against its parts, one after another without helpers.
template <class T>
void test_layer(Random& random, const std::vector<Setting>& settings) {
  const Sequences s(random, sizeof(T) == 1);
  const auto& shape = s.shape;
  const int H = shape.heads, G = shape.kv_heads, h = shape.width;
  const bool int8 = random.integer(0, 2);
  const Format format = static_cast<Format>(random.integer(0, 1));
  const int64_t M = s.count(), D = 6 * random.integer(1, 20);
  const int64_t F = 6 * random.integer(1, M > 40 ? 10 : 40);
  const bool along = random.integer(0, 1);
  const int blocks = pick(random, {1, 2, 3, 6});
  const auto weights = [&](int64_t outputs, int64_t inputs, bool out) {
    return some_weights(random, format, outputs, inputs, out && along, blocks);
  };
  const Weights q = weights(H * h, D, false), k = weights(G * h, D, false),
                v = weights(G * h, D, false), o = weights(D, H * h, true),
                gate = weights(F, D, false), up = weights(F, D, false),
                down = weights(D, F, true);
  const Block<float> norms[] = {
      Block<float>(random.normals(D)), Block<float>(random.normals(D)),
      Block<float>(random.normals(h)), Block<float>(random.normals(h)),
      Block<float>(random.normals(H * h)), Block<float>(random.normals(F))};
  const bool gains = random.integer(0, 1);
  const bool o_gain = random.integer(0, 1), down_gain = random.integer(0, 1);
  const auto f = pick(random, {tritera::kSilu, tritera::kRelu2});
  const LayerWeights layer{norms[0].get(),
                           norms[1].get(),
                           q.matrix(),
                           k.matrix(),
                           v.matrix(),
                           o.matrix(),
                           gate.matrix(),
                           up.matrix(),
                           down.matrix(),
                           gains ? norms[2].get() : nullptr,
                           gains ? norms[3].get() : nullptr,
                           o_gain ? norms[4].get() : nullptr,
                           down_gain ? norms[5].get() : nullptr};
  Caches<T> before(s.cache_heads(), h, shape.slots);
  fill(random, s, before);
  const std::vector<float> from = some_tokens_of(random, M, D);
  for (const Setting& setting : settings) {
    const Kernel& kernel = setting.kernel;
    Block<float> x(from), wide(M * std::max(shape.qkv(), 2 * F)),
        narrow(M * H * h);
    Caches<T> wanted(s.cache_heads(), h, shape.slots);
    wanted.copy(before);
    {
      Team team(setting.crews[0]);
      tritera::norm_multiply(team, kernel, M, int8, x.get(),
                             layer.attention_norm, shape.epsilon, &layer.q, 3,
                             wide.get());
      tritera::attention(team, kernel, s.batch(), shape, wide.get(),
                         layer.q_gain, layer.k_gain, wanted.get(),
                         narrow.get());
      tritera::multiply_add(team, kernel, M, int8, narrow.get(), layer.o_gain,
                            shape.epsilon, layer.o, x.get(), x.get());
      tritera::norm_multiply(team, kernel, M, int8, x.get(), layer.mlp_norm,
                             shape.epsilon, &layer.gate, 2, wide.get());
      tritera::gated_multiply_add(team, kernel, M, int8, wide.get(), f,
                                  layer.down_gain, shape.epsilon, layer.down,
                                  x.get(), x.get());
    }
    for (const size_t crew : {0, random.integer(1, 4)}) {
      Block<float> y(from);
      Caches<T> caches(s.cache_heads(), h, shape.slots);
      caches.copy(before);
      Team team(setting.crews[crew]);
      tritera::layer(team, kernel, s.batch(), shape, f, int8, layer,
                     caches.get(), y.get());
      setting.tally.equal(setting.name("layer"),
                          same(x, y) && caches == wanted);
    }
  }
}

}  // namespace
}  // namespace testing

int main(int argc, char** argv) {
  using namespace testing;
  const int cases = argc > 1 ? atoi(argv[1]) : 300;
  testing::Random random(argc > 2 ? atoi(argv[2]) : 1);
  Tally tally;
  const Crews crews;
  std::vector<Setting> settings;
  for (const tritera::Kernel* kernel : machine_kernels())
    settings.push_back({*kernel, crews, tally});
  for (int i = 0; i < cases; ++i) {
    test_multiply(random, i % 30 == 29, settings);
    test_fused(random, settings);
    if (i % 4 == 0) test_attention<uint16_t>(random, settings);
    if (i % 4 == 1) test_attention<int8_t>(random, settings);
    if (i % 4 == 2) test_layer<uint16_t>(random, settings);
    if (i % 4 == 3) test_layer<int8_t>(random, settings);
  }
  return tally.report() ? 1 : 0;
}
