// SPDX-License-Identifier: Apache-2.0
// tritera_kernels.fused as XLA custom calls.
#include <algorithm>
#include <vector>

#include "decoder.h"
#include "dispatch.h"
#include "ffi.h"

namespace tritera {
namespace {

using S32 = ffi::Buffer<ffi::S32>;

// `read_matrix` where there is no batch of them.
ffi::Error read_one_matrix(ffi::AnyBuffer data, ffi::AnyBuffer scale,
                           const MatrixKind& kind, int64_t inputs,
                           Matrix* matrix) {
  if (data.dimensions().size() > 2 || scale.dimensions().size() > 1)
    return refuse("packed data of shape " + shape_of(data.dimensions()) +
                  ", scale " + shape_of(scale.dimensions()) +
                  ", wanted a matrix and a vector");
  return read_matrix(data, scale, kind, inputs, matrix);
}

// Positional arguments of a call, checked one after another; the first error
// stays.
class Arguments {
 public:
  explicit Arguments(ffi::RemainingArgs args) : args_(args) {}

  // A float32 vector of n values.
  const float* vector(int64_t n) {
    const ffi::AnyBuffer b = next();
    if (b.element_type() != ffi::F32 ||
        static_cast<int64_t>(b.element_count()) != n)
      fail("argument " + std::to_string(at_) + " of shape " +
           shape_of(b.dimensions()) + ", wanted float32 [" +
           std::to_string(n) + "]");
    return static_cast<const float*>(b.untyped_data());
  }

  Matrix matrix(const MatrixKind& kind, int64_t inputs) {
    const ffi::AnyBuffer data = next();
    const ffi::AnyBuffer scale = next();
    Matrix m{};
    if (ffi::Error e = read_one_matrix(data, scale, kind, inputs, &m);
        e.failure() && error_.success())
      error_ = std::move(e);
    return m;
  }

  ffi::AnyBuffer next() {
    // An absent one: the error is reported before it is read.
    static XLA_FFI_Buffer none{};
    auto arg = args_.get<ffi::AnyBuffer>(at_++);
    if (arg.has_value()) return *arg;
    fail("too few arguments");
    return ffi::AnyBuffer(&none);
  }

  // Whether all but the `last` have been taken.
  void end(size_t last) {
    if (at_ + last != args_.size())
      fail(std::to_string(args_.size()) + " arguments after the first ones, "
           "wanted " + std::to_string(at_ + last));
  }

  void fail(const std::string& what) {
    if (error_.success()) error_ = refuse(what);
  }
  bool failed() const { return error_.failure(); }
  ffi::Error error() { return std::move(error_); }

 private:
  ffi::RemainingArgs args_;
  size_t at_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

bool is_matrix(ffi::AnyBuffer::Dimensions d, int64_t rows, int64_t columns) {
  return d.size() == 2 && d[0] == rows && d[1] == columns;
}

// A gain of `inputs` values, or null for one of none.
ffi::Error read_gain(const F32& gain, int64_t inputs, const float** values) {
  const int64_t n = gain.element_count();
  if (n && n != inputs)
    return refuse("gain of shape " + shape_of(gain.dimensions()) +
                  ", wanted [" + std::to_string(inputs) + "] or none");
  *values = n ? gain.typed_data() : nullptr;
  return ffi::Error::Success();
}

ffi::Error check_gate(int64_t gate) {
  if (gate >= 0 && gate < kGates) return ffi::Error::Success();
  return refuse("gate " + std::to_string(gate));
}

ffi::Error check_rank2(const F32& x, const char* name) {
  if (x.dimensions().size() == 2) return ffi::Error::Success();
  return refuse(std::string(name) + " of shape " + shape_of(x.dimensions()) +
                ", wanted a matrix");
}

ffi::Error norm_matmul(ffi::ThreadPool pool, F32 x, F32 gain,
                       ffi::RemainingArgs rest, F32Result y, int64_t format,
                       bool along_inputs, bool int8, float epsilon) {
  if (auto e = check_rank2(x, "x"); e.failure()) return e;
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1];
  const int count = static_cast<int>(rest.size() / 2);
  if (rest.size() % 2 || count < 1 || count > 3)
    return refuse("1 to 3 matrices, each data and scale");
  Arguments arguments(rest);
  Matrix matrices[3];
  int64_t N = 0;
  for (int i = 0; i < count; ++i) {
    matrices[i] = arguments.matrix({format, along_inputs, int8}, K);
    N += matrices[i].outputs;
  }
  if (static_cast<int64_t>(gain.element_count()) != K)
    arguments.fail("gain of shape " + shape_of(gain.dimensions()));
  if (!is_matrix(y->dimensions(), M, N))
    arguments.fail("result of shape " + shape_of(y->dimensions()));
  for (int i = 1; i < count && !arguments.failed(); ++i)
    if (matrices[i].planes().segments != matrices[0].planes().segments)
      arguments.fail("matrices of one x differ in their scale blocks");
  if (arguments.failed()) return arguments.error();
  const Helpers helpers = helpers_of(pool);
  Team team(helpers);
  norm_multiply(team, active_kernel(), M, int8, x.typed_data(),
                gain.typed_data(), epsilon, matrices, count, y->typed_data());
  return ffi::Error::Success();
}

// Both matmuls that add to a residual: x is `halves` K wide, and `run` gets
// what was checked.
template <class Run>
ffi::Error add_matmul(ffi::ThreadPool& pool, const F32& x, int halves,
                      const F32& gain, ffi::AnyBuffer data,
                      ffi::AnyBuffer scale, const MatrixKind& kind,
                      const F32& residual, F32Result& y, const Run& run) {
  if (auto e = check_rank2(x, "x"); e.failure()) return e;
  if (auto e = check_rank2(residual, "residual"); e.failure()) return e;
  if (x.dimensions()[1] % halves)
    return refuse("gate_up of shape " + shape_of(x.dimensions()));
  const int64_t M = x.dimensions()[0], K = x.dimensions()[1] / halves;
  Matrix matrix;
  if (auto e = read_one_matrix(data, scale, kind, K, &matrix); e.failure())
    return e;
  const float* gains;
  if (auto e = read_gain(gain, K, &gains); e.failure()) return e;
  if (!is_matrix(residual.dimensions(), M, matrix.outputs) ||
      !is_matrix(y->dimensions(), M, matrix.outputs))
    return refuse("residual of shape " + shape_of(residual.dimensions()) +
                  ", result " + shape_of(y->dimensions()) + " beside x of " +
                  shape_of(x.dimensions()));
  const Helpers helpers = helpers_of(pool);
  Team team(helpers);
  run(team, M, matrix, gains);
  return ffi::Error::Success();
}

ffi::Error matmul_add(ffi::ThreadPool pool, F32 x, F32 gain,
                      ffi::AnyBuffer data, ffi::AnyBuffer scale, F32 residual,
                      F32Result y, int64_t format, bool along_inputs,
                      bool int8, float epsilon) {
  return add_matmul(
      pool, x, 1, gain, data, scale, {format, along_inputs, int8}, residual, y,
      [&](Team& team, int64_t M, const Matrix& matrix, const float* gains) {
        multiply_add(team, active_kernel(), M, int8, x.typed_data(), gains,
                     epsilon, matrix, residual.typed_data(), y->typed_data());
      });
}

ffi::Error gated_matmul_add(ffi::ThreadPool pool, F32 gate_up, F32 gain,
                            ffi::AnyBuffer data, ffi::AnyBuffer scale,
                            F32 residual, F32Result y, int64_t format,
                            bool along_inputs, bool int8, float epsilon,
                            int64_t gate) {
  if (auto e = check_gate(gate); e.failure()) return e;
  return add_matmul(
      pool, gate_up, 2, gain, data, scale, {format, along_inputs, int8},
      residual, y,
      [&](Team& team, int64_t M, const Matrix& matrix, const float* gains) {
        gated_multiply_add(team, active_kernel(), M, int8,
                           gate_up.typed_data(), static_cast<Gate>(gate),
                           gains, epsilon, matrix, residual.typed_data(),
                           y->typed_data());
      });
}

// Where a cache lies among results that alias its arguments.
ffi::Error read_cache(ffi::RemainingRets& results, size_t first, bool int8,
                      int64_t rows, AttentionShape* shape, Cache* cache) {
  const size_t wanted = int8 ? 4 : 2;
  std::vector<ffi::Result<ffi::AnyBuffer>> part;
  for (size_t i = 0; i < wanted; ++i) {
    auto result = results.get<ffi::AnyBuffer>(first + i);
    if (!result.has_value()) return refuse("too few results for a cache");
    part.push_back(*result);
  }
  const auto k = part[0]->dimensions(), v = part[1]->dimensions();
  const int64_t G = shape->kv_heads, h = shape->width;
  const auto type = int8 ? ffi::S8 : ffi::BF16;
  const bool fits = k.size() == 4 && v.size() == 4 && k[0] == rows &&
                    k[1] == G && k[2] == h && v[0] == rows && v[1] == G &&
                    v[2] == k[3] && v[3] == h && k[3] % 64 == 0 &&
                    part[0]->element_type() == type &&
                    part[1]->element_type() == type;
  if (!fits)
    return refuse("cache of keys " + shape_of(k) + ", values " + shape_of(v) +
                  ", wanted " + (int8 ? "int8" : "bfloat16") + " of " +
                  std::to_string(rows) + " rows, " + std::to_string(G) +
                  " heads of width " + std::to_string(h) +
                  ", 64 n slots");
  if (shape->slots && shape->slots != k[3])
    return refuse("caches of " + std::to_string(shape->slots) + " and of " +
                  std::to_string(k[3]) + " slots");
  shape->type = int8 ? kInt8 : kBfloat16;
  shape->slots = k[3];
  *cache = {part[0]->untyped_data(), part[1]->untyped_data(), nullptr, nullptr};
  if (int8) {
    for (int i = 2; i < 4; ++i)
      if (part[i]->element_type() != ffi::F32 ||
          static_cast<int64_t>(part[i]->element_count()) != rows * G * k[3])
        return refuse("cache scales of shape " +
                      shape_of(part[i]->dimensions()));
    cache->k_scale = static_cast<float*>(part[2]->untyped_data());
    cache->v_scale = static_cast<float*>(part[3]->untyped_data());
  }
  return ffi::Error::Success();
}

ffi::Error check_heads(int64_t heads, int64_t kv_heads, int64_t width) {
  // The bound keeps every product of them within an int.
  constexpr int64_t kMost = 1 << 24;
  if (kv_heads < 1 || heads < kv_heads || heads % kv_heads || width < 2 ||
      width % 2 || heads > kMost || width > kMost || heads * width > kMost)
    return refuse(std::to_string(heads) + " heads and " +
                  std::to_string(kv_heads) + " of keys, of width " +
                  std::to_string(width) + ", do not fit");
  return ffi::Error::Success();
}

ffi::Error check_batch(const AttentionShape& shape, const Batch& batch,
                       int64_t tokens) {
  if (batch.rows < 1 || tokens % batch.rows)
    return refuse(std::to_string(tokens) + " tokens in " +
                  std::to_string(batch.rows) + " rows");
  // Values, not shapes: what a caller's mistake would write out of bounds.
  for (int64_t b = 0; b < batch.rows; ++b)
    if (batch.start[b] < 0 || batch.start[b] + batch.tokens > shape.slots)
      return refuse("row " + std::to_string(b) + " has " +
                    std::to_string(batch.tokens) + " tokens from position " +
                    std::to_string(batch.start[b]) + ", the cache " +
                    std::to_string(shape.slots) + " slots");
  return ffi::Error::Success();
}

// Arguments: the cache's arrays, which the results after y alias.
ffi::Error attend(ffi::ThreadPool pool, F32 qkv, F32 q_gain, F32 k_gain,
                  S32 start, ffi::RemainingArgs rest, F32Result y,
                  ffi::RemainingRets caches, int64_t heads, int64_t kv_heads,
                  int64_t width, float theta, float epsilon, bool int8_cache) {
  if (auto e = check_rank2(qkv, "qkv"); e.failure()) return e;
  if (auto e = check_heads(heads, kv_heads, width); e.failure()) return e;
  AttentionShape shape{static_cast<int>(heads), static_cast<int>(kv_heads),
                       static_cast<int>(width), theta, epsilon, kBfloat16, 0};
  const int64_t M = qkv.dimensions()[0];
  const int64_t B = start.element_count();
  const size_t arrays = int8_cache ? 4 : 2;
  if (rest.size() != arrays || caches.size() != arrays)
    return refuse(std::to_string(rest.size()) + " cache arguments and " +
                  std::to_string(caches.size()) + " results, wanted " +
                  std::to_string(arrays));
  Cache cache;
  if (auto e = read_cache(caches, 0, int8_cache, B, &shape, &cache);
      e.failure())
    return e;
  const Batch batch{B, B ? M / B : 0, start.typed_data()};
  if (auto e = check_batch(shape, batch, M); e.failure()) return e;
  const int64_t gains = q_gain.element_count();
  if (qkv.dimensions()[1] != shape.qkv() ||
      !is_matrix(y->dimensions(), M, heads * width) ||
      (gains && gains != width) ||
      q_gain.element_count() != k_gain.element_count())
    return refuse("qkv of shape " + shape_of(qkv.dimensions()) + ", result " +
                  shape_of(y->dimensions()) + ", gains " +
                  shape_of(q_gain.dimensions()));
  const Helpers helpers = helpers_of(pool);
  Team team(helpers);
  attention(team, active_kernel(), batch, shape, qkv.typed_data(),
            gains ? q_gain.typed_data() : nullptr,
            gains ? k_gain.typed_data() : nullptr, cache, y->typed_data());
  return ffi::Error::Success();
}

// All layers in one call. Arguments, a layer: attention_norm, q, k, v, o,
// mlp_norm, gate, up, down (a matrix is data and scale), with `gains` q_gain
// and k_gain, with `o_gain` and `down_gain` these; then every layer's cache
// arrays, which the results after x alias.
ffi::Error decoder_layers(ffi::ThreadPool pool, F32 x, S32 start,
                          ffi::RemainingArgs rest, F32Result y,
                          ffi::RemainingRets caches, int64_t layers,
                          int64_t heads, int64_t kv_heads, int64_t width,
                          float theta, float epsilon, int64_t format,
                          bool out_along_inputs, bool int8, int64_t gate,
                          bool gains, bool o_gain, bool down_gain,
                          bool int8_cache) {
  if (auto e = check_rank2(x, "x"); e.failure()) return e;
  if (auto e = check_gate(gate); e.failure()) return e;
  if (auto e = check_heads(heads, kv_heads, width); e.failure()) return e;
  AttentionShape shape{static_cast<int>(heads), static_cast<int>(kv_heads),
                       static_cast<int>(width), theta, epsilon, kBfloat16, 0};
  const int64_t M = x.dimensions()[0], D = x.dimensions()[1];
  const int64_t B = start.element_count();
  const Batch batch{B, B ? M / B : 0, start.typed_data()};
  if (layers < 1 || layers > static_cast<int64_t>(rest.size()))
    return refuse(std::to_string(layers) + " layers of " +
                  std::to_string(rest.size()) + " arguments");
  const MatrixKind in{format, false, int8}, out{format, out_along_inputs, int8};
  Arguments arguments(rest);
  std::vector<LayerWeights> weights(layers);
  std::vector<Cache> cache(layers);
  for (int64_t i = 0; i < layers; ++i) {
    LayerWeights& w = weights[i];
    w.attention_norm = arguments.vector(D);
    w.q = arguments.matrix(in, D);
    w.k = arguments.matrix(in, D);
    w.v = arguments.matrix(in, D);
    w.o = arguments.matrix(out, heads * width);
    w.mlp_norm = arguments.vector(D);
    w.gate = arguments.matrix(in, D);
    w.up = arguments.matrix(in, D);
    if (arguments.failed()) return arguments.error();
    w.down = arguments.matrix(out, w.gate.outputs);
    w.q_gain = gains ? arguments.vector(width) : nullptr;
    w.k_gain = gains ? arguments.vector(width) : nullptr;
    w.o_gain = o_gain ? arguments.vector(heads * width) : nullptr;
    w.down_gain = down_gain ? arguments.vector(w.gate.outputs) : nullptr;
    if (w.q.outputs != heads * width || w.k.outputs != kv_heads * width ||
        w.v.outputs != w.k.outputs || w.o.outputs != D ||
        w.up.outputs != w.gate.outputs || w.down.outputs != D)
      arguments.fail("matrices of layer " + std::to_string(i));
    if (arguments.failed()) return arguments.error();
    if (auto e = read_cache(caches, i * (int8_cache ? 4 : 2), int8_cache, B,
                            &shape, &cache[i]);
        e.failure())
      return e;
    if (auto e = check_batch(shape, batch, M); e.failure()) return e;
  }
  const size_t arrays = layers * (int8_cache ? 4 : 2);
  arguments.end(arrays);
  if (caches.size() != arrays)
    arguments.fail(std::to_string(caches.size()) + " cache results, wanted " +
                   std::to_string(arrays));
  if (arguments.failed()) return arguments.error();
  if (!is_matrix(y->dimensions(), M, D))
    return refuse("result of shape " + shape_of(y->dimensions()));
  if (y->typed_data() != x.typed_data())
    std::copy_n(x.typed_data(), x.element_count(), y->typed_data());
  const Helpers helpers = helpers_of(pool);
  Team team(helpers);
  const Kernel& kernel = active_kernel();
  for (int64_t i = 0; i < layers; ++i)
    layer(team, kernel, batch, shape, static_cast<Gate>(gate), int8,
          weights[i], cache[i], y->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tritera

#define TRITERA_EXPORT __attribute__((visibility("default")))

extern "C" {
TRITERA_EXPORT XLA_FFI_Error* tritera_norm_matmul(XLA_FFI_CallFrame*);
TRITERA_EXPORT XLA_FFI_Error* tritera_matmul_add(XLA_FFI_CallFrame*);
TRITERA_EXPORT XLA_FFI_Error* tritera_gated_matmul_add(XLA_FFI_CallFrame*);
TRITERA_EXPORT XLA_FFI_Error* tritera_attention(XLA_FFI_CallFrame*);
TRITERA_EXPORT XLA_FFI_Error* tritera_decoder_layers(XLA_FFI_CallFrame*);
}

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_norm_matmul, tritera::norm_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<tritera::F32>()
                                  .Arg<tritera::F32>()
                                  .RemainingArgs()
                                  .Ret<tritera::F32>()
                                  .Attr<int64_t>("format")
                                  .Attr<bool>("along_inputs")
                                  .Attr<bool>("int8")
                                  .Attr<float>("epsilon"));

// Of both matmuls that add to a residual.
static auto add_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<tritera::F32>()
      .Arg<tritera::F32>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<tritera::F32>()
      .Ret<tritera::F32>()
      .Attr<int64_t>("format")
      .Attr<bool>("along_inputs")
      .Attr<bool>("int8")
      .Attr<float>("epsilon");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_matmul_add, tritera::matmul_add,
                              add_binding());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_gated_matmul_add,
                              tritera::gated_matmul_add,
                              add_binding().Attr<int64_t>("gate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_attention, tritera::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<tritera::F32>()
                                  .Arg<tritera::F32>()
                                  .Arg<tritera::F32>()
                                  .Arg<tritera::S32>()
                                  .RemainingArgs()
                                  .Ret<tritera::F32>()
                                  .RemainingRets()
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("width")
                                  .Attr<float>("theta")
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("int8_cache"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_decoder_layers, tritera::decoder_layers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<tritera::F32>()
                                  .Arg<tritera::S32>()
                                  .RemainingArgs()
                                  .Ret<tritera::F32>()
                                  .RemainingRets()
                                  .Attr<int64_t>("layers")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<int64_t>("width")
                                  .Attr<float>("theta")
                                  .Attr<float>("epsilon")
                                  .Attr<int64_t>("format")
                                  .Attr<bool>("out_along_inputs")
                                  .Attr<bool>("int8")
                                  .Attr<int64_t>("gate")
                                  .Attr<bool>("gains")
                                  .Attr<bool>("o_gain")
                                  .Attr<bool>("down_gain")
                                  .Attr<bool>("int8_cache"));
