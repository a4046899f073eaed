// SPDX-License-Identifier: Apache-2.0
// Random calls of XLA's custom calls, through frames as XLA would make them.
//
//   fuzz_handlers [CALLS [SEED]]
//
// A call has a seed of its own, SEED + its number, so that it can be repeated.
// `wrong` says by the documents of the operations whether a call is in order.
// One that is must give what the drivers give; one that is not must be refused
// and leave all memory as it was. Buffers end, or begin, at a page that may
// not be touched, or lie on the heap for the address sanitizer; they have the
// alignment of their elements and no more. Where a buffer is larger than 1 MiB
// none of it may be touched: such calls are only made where they are wrong.
#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "case.h"
#include "decoder.h"
#include "dispatch.h"
#include "ops_testing.h"
#include "pool.h"
#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* tritera_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* tritera_norm_matmul(XLA_FFI_CallFrame*);
XLA_FFI_Error* tritera_matmul_add(XLA_FFI_CallFrame*);
XLA_FFI_Error* tritera_gated_matmul_add(XLA_FFI_CallFrame*);
XLA_FFI_Error* tritera_attention(XLA_FFI_CallFrame*);
XLA_FFI_Error* tritera_decoder_layers(XLA_FFI_CallFrame*);
}

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

// The pool, and what it does with tasks.
struct XLA_FFI_InvokeContext {
  testing::Pool* pool;
  int64_t threads;
  enum { kAdds, kRuns, kFails } schedule;
};

namespace testing {
namespace {

constexpr auto U8 = XLA_FFI_DataType_U8, S8 = XLA_FFI_DataType_S8,
               BF16 = XLA_FFI_DataType_BF16, S32 = XLA_FFI_DataType_S32,
               F32 = XLA_FFI_DataType_F32, S64 = XLA_FFI_DataType_S64,
               PRED = XLA_FFI_DataType_PRED;
constexpr int64_t kLargest = 1 << 20;  // bytes that are there

size_t width_of(XLA_FFI_DataType type) {
  return type == U8 || type == S8 ? 1 : type == BF16 ? 2 : type == S64 ? 8 : 4;
}

struct Value {
  XLA_FFI_DataType type;
  std::vector<int64_t> dims;
  int alias = -1;  // the argument in whose memory a result lies
  std::vector<uint8_t> bytes{};
  uint8_t* data = nullptr;

  int64_t count() const {
    int64_t n = 1;
    for (int64_t d : dims) n *= d;
    return n;
  }
  int64_t size() const { return count() * width_of(type); }
  bool is(XLA_FFI_DataType t, size_t rank) const {
    return type == t && dims.size() == rank;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

struct Attribute {
  XLA_FFI_DataType type;
  union {
    int64_t i;
    float f;
    bool b;
  };
};

Attribute integer(int64_t i) {
  Attribute a{S64, {0}};
  a.i = i;
  return a;
}
Attribute real(float f) {
  Attribute a{F32, {0}};
  a.f = f;
  return a;
}
Attribute flag(bool b) {
  Attribute a{PRED, {0}};
  a.b = b;
  return a;
}

enum Target { kMatmul, kNorm, kAdd, kGated, kAttention, kLayers, kTargets };
constexpr const char* kTargetNames[kTargets] = {
    "matmul",    "norm_matmul",   "matmul_add", "gated_matmul_add",
    "attention", "decoder_layers"};

struct Call {
  Target target;
  std::vector<Value> args, rets;
  std::map<std::string, Attribute> attrs;  // sorted, as XLA has them
  bool misnamed = false;  // an attribute that is none of the target's

  int64_t i(const char* name) const { return attrs.at(name).i; }
  float f(const char* name) const { return attrs.at(name).f; }
  bool b(const char* name) const { return attrs.at(name).b; }
};

// Making calls.

int64_t small(Random& random, int most) {
  return random.integer(0, 9) ? random.integer(1, most)
                              : random.integer(0, 4) ? 1 : 0;
}

void add_matrix(Random& random, Call& call, int format, bool along,
                int64_t N, int64_t K, const std::vector<int64_t>& leading) {
  const int64_t length = along ? K : N;
  int64_t blocks = 1;
  if (random.integer(0, 2)) {
    blocks = random.integer(1, 6);
    if (length % blocks) blocks = random.integer(0, 1) && length ? length : 1;
  }
  if (along && blocks > 12) blocks = 1;
  const int64_t segments = along ? blocks : 1;
  const int64_t each = tritera::kDigitsPerByte[format];
  Value data{U8, leading}, scale{F32, leading};
  data.dims.push_back(N);
  data.dims.push_back(segments * ((K / segments + each - 1) / each));
  scale.dims.push_back(blocks);
  call.args.push_back(data);
  call.args.push_back(scale);
}

Call some_call(Random& random) {
  Call call;
  call.target = static_cast<Target>(random.integer(0, kTargets - 1));
  const bool large = random.integer(0, 49) == 0;
  const bool int8 = random.integer(0, 2);
  const bool along = random.integer(0, 1);
  const bool ternary = call.target == kLayers && random.integer(0, 9);
  const int format = random.integer(0, int8 && !ternary ? 2 : 1);
  const int64_t M = small(random, large ? 70 : 9);
  const int64_t K = small(random, large ? 400 : 90);
  const int64_t N = small(random, large ? 200 : 40);
  if (call.target < kAttention) {
    call.attrs = {{"format", integer(format)},
                  {"along_inputs", flag(along)},
                  {"int8", flag(int8)}};
  }
  switch (call.target) {
    case kMatmul: {
      std::vector<int64_t> leading;
      for (int rank = random.integer(0, 3); rank > 1; --rank)
        leading.push_back(small(random, 3));
      const auto own = [&] {  // or 1 here and there, or none
        std::vector<int64_t> some = leading;
        for (int64_t& d : some)
          if (random.integer(0, 2) == 0) d = 1;
        return random.integer(0, 1) ? std::vector<int64_t>() : some;
      };
      Value x{F32, leading}, y{F32, leading};
      for (int64_t& d : x.dims)
        if (random.integer(0, 3) == 0) d = 1;
      x.dims.insert(x.dims.end(), {M, K});
      y.dims.insert(y.dims.end(), {M, N});
      call.args.push_back(x);
      add_matrix(random, call, format, along, N, K, own());
      if (random.integer(0, 1) && call.args[2].dims.size() == 1) {
        const auto scales = own();
        call.args[2].dims.insert(call.args[2].dims.begin(), scales.begin(),
                                 scales.end());
      }
      call.rets.push_back(y);
      break;
    }
    case kNorm: {
      call.attrs["epsilon"] = real(1e-5f);
      call.args = {{F32, {M, K}}, {F32, {K}}};
      int64_t width = 0;
      for (int i = random.integer(1, 3); i > 0; --i) {
        const int64_t n = small(random, 30);
        add_matrix(random, call, format, along, n, K, {});
        width += n;
      }
      call.rets.push_back({F32, {M, width}});
      break;
    }
    case kAdd:
    case kGated:
      call.attrs["epsilon"] = real(1e-5f);
      if (call.target == kGated)
        call.attrs["gate"] = integer(random.integer(0, 1));
      call.args = {{F32, {M, call.target == kAdd ? K : 2 * K}},
                   {F32, {random.integer(0, 1) ? K : 0}}};
      add_matrix(random, call, format, along, N, K, {});
      call.args.push_back({F32, {M, N}});
      call.rets.push_back({F32, {M, N}});
      break;
    default: {
      const int64_t B = random.integer(1, 3), G = random.integer(1, 2);
      const int64_t H = G * random.integer(1, 3), h = 2 * random.integer(1, 8);
      const int64_t T = large ? random.integer(1, 70) : small(random, 6);
      const int64_t S = 64 * random.integer(large ? 2 : 1, 2);
      const bool small_cache = random.integer(0, 1);
      const bool gains = random.integer(0, 1);
      const bool o_gain = random.integer(0, 1);
      const bool down_gain = random.integer(0, 1);
      call.attrs = {{"heads", integer(H)},     {"kv_heads", integer(G)},
                    {"width", integer(h)},     {"theta", real(1e4f)},
                    {"epsilon", real(1e-5f)},  {"int8_cache",
                                                flag(small_cache)}};
      int64_t layers = 1;
      if (call.target == kAttention) {
        call.args = {{F32, {B * T, (H + 2 * G) * h}},
                     {F32, {gains ? h : 0}},
                     {F32, {gains ? h : 0}},
                     {S32, {B}}};
        call.rets.push_back({F32, {B * T, H * h}});
      } else {
        layers = random.integer(1, 2);
        const int64_t D = random.integer(1, 40), F = random.integer(1, 50);
        call.attrs.insert({{"layers", integer(layers)},
                           {"format", integer(format)},
                           {"out_along_inputs", flag(along)},
                           {"int8", flag(int8)},
                           {"gate", integer(random.integer(0, 1))},
                           {"gains", flag(gains)},
                           {"o_gain", flag(o_gain)},
                           {"down_gain", flag(down_gain)}});
        call.args = {{F32, {B * T, D}}, {S32, {B}}};
        call.rets.push_back({F32, {B * T, D}});
        for (int i = 0; i < layers; ++i) {
          const auto add = [&](int64_t n, int64_t k, bool out) {
            add_matrix(random, call, format, along && out, n, k, {});
          };
          call.args.push_back({F32, {D}});
          add(H * h, D, false);
          add(G * h, D, false);
          add(G * h, D, false);
          add(D, H * h, true);
          call.args.push_back({F32, {D}});
          add(F, D, false);
          add(F, D, false);
          add(D, F, true);
          for (int gain = 0; gain < 2 * gains; ++gain)
            call.args.push_back({F32, {h}});
          if (o_gain) call.args.push_back({F32, {H * h}});
          if (down_gain) call.args.push_back({F32, {F}});
        }
      }
      for (int i = 0; i < layers; ++i) {
        const auto type = small_cache ? S8 : BF16;
        const int64_t slots = i && !random.integer(0, 9) ? S + 64 : S;
        std::vector<Value> arrays = {{type, {B, G, h, slots}},
                                     {type, {B, G, slots, h}}};
        if (small_cache) arrays.insert(arrays.end(), 2, {F32, {B, G, slots}});
        for (Value& array : arrays) {
          call.args.push_back(array);
          array.alias = call.args.size() - 1;
          call.rets.push_back(array);
        }
      }
    }
  }
  return call;
}

int64_t another(Random& random, int64_t size) {
  switch (random.integer(0, 9)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return 2 * size;
    case 3: return size / 2;
    case 4: return size + 64;
    case 5:
      return (int64_t{1} << random.integer(16, 44)) + random.integer(0, 1);
    case 6: return int64_t{1} << random.integer(31, 33);
    case 7: return size > 0 ? size - 1 : 1;
    default: return size + 1;
  }
}

void spoil(Random& random, Call& call) {
  std::vector<Value>& values = random.integer(0, 3) ? call.args : call.rets;
  if (values.empty()) return;
  const auto any = [&](std::vector<Value>& values) -> Value& {
    return values[random.integer(0, values.size() - 1)];
  };
  switch (random.integer(0, 11)) {
    case 0: {
      const XLA_FFI_DataType types[] = {U8, S8, BF16, S32, F32, S64};
      any(values).type = types[random.integer(0, 5)];
      break;
    }
    case 1: {
      auto& dims = any(values).dims;
      if (random.integer(0, 1) || dims.empty())
        dims.insert(dims.begin() + random.integer(0, dims.size()),
                    random.integer(0, 2));
      else
        dims.erase(dims.begin() + random.integer(0, dims.size() - 1));
      break;
    }
    case 2:
      if (random.integer(0, 1))
        values.push_back({F32, {random.integer(0, 3)}});
      else
        values.erase(values.begin() + random.integer(0, values.size() - 1));
      for (Value& value : call.rets) value.alias = -1;
      break;
    case 3: case 4: case 5: {
      if (call.misnamed) return;
      auto attr = call.attrs.begin();
      std::advance(attr, random.integer(0, call.attrs.size() - 1));
      Attribute& a = attr->second;
      if (a.type == PRED) a.b = !a.b;
      if (a.type == F32) a.f = random.integer(0, 1) ? kNan : -1.0f;
      if (a.type == S64) {
        const uint64_t now = a.i, wide = uint64_t{1} << 32;
        const uint64_t others[] = {
            0,       ~uint64_t{0}, 2,          3,    now + 1,   now - 1,
            2 * now, 1000,         now + wide, wide, INT64_MAX, wide << 31,
            wide << 29,            wide / 4,   -now};
        a.i = static_cast<int64_t>(others[random.integer(0, 14)]);
      }
      break;
    }
    case 6:
      if (random.integer(0, 3) || call.misnamed) return;
      call.misnamed = true;
      if (random.integer(0, 1))
        call.attrs.begin()->second.type = S32;
      else
        call.attrs.erase(call.attrs.begin());
      break;
    default: {
      auto& dims = any(values).dims;
      if (dims.empty()) return;
      int64_t& d = dims[random.integer(0, dims.size() - 1)];
      d = another(random, d);
    }
  }
  // What is written in place is both argument and result.
  for (Value& value : call.rets) {
    if (value.alias < 0) continue;
    Value& other = call.args[value.alias];
    if (random.integer(0, 1))
      std::swap(other.dims, value.dims), std::swap(other.type, value.type);
    value.dims = other.dims;
    value.type = other.type;
  }
}

// XLA has no shapes whose size is no number.
bool possible(const Call& call) {
  for (const auto* values : {&call.args, &call.rets}) {
    for (const Value& value : *values) {
      double size = 8;
      for (int64_t d : value.dims) size *= std::max<int64_t>(d, 1);
      if (size > 1e18) return false;
    }
  }
  return true;
}

// What is wrong with a call; empty if nothing.

struct Matrices {
  int64_t format;
  bool along, int8;

  std::string wrong(const Value& data, const Value& scale, int64_t N,
                    int64_t K, bool batch = false) const {
    if (format < 0 || format > 2 || (format == 2 && !int8)) return "format";
    if (data.type != U8 || scale.type != F32) return "type of a matrix";
    if (data.dims.size() < 2 || scale.dims.empty() ||
        (!batch && (data.dims.size() > 2 || scale.dims.size() > 1)))
      return "rank of a matrix";
    const int64_t blocks = scale.dims.back();
    if (K < 1 || N < 1 || data.dims[data.dims.size() - 2] != N || blocks < 1 ||
        (along ? K : N) % blocks || K > (format == 2 ? 1 << 16 : 1 << 22))
      return "size of a matrix";
    const int64_t segments = along ? blocks : 1;
    const int64_t each = tritera::kDigitsPerByte[format];
    if (data.dims.back() != segments * ((K / segments + each - 1) / each))
      return "bytes of a row";
    return "";
  }
};

std::string wrong_heads(const Call& call) {
  const int64_t H = call.i("heads"), G = call.i("kv_heads"),
                h = call.i("width");
  if (H < 1 || G < 1 || H % G || h < 2 || h % 2 || H > 1 << 24 ||
      h > 1 << 24 || H * h > 1 << 24)
    return "heads";
  return "";
}

// `arrays`: a cache among the results. Positions are looked at only there.
std::string wrong_cache(const Call& call, const Value* arrays, int64_t slots,
                        const Value& start, int64_t M) {
  const bool int8 = call.b("int8_cache");
  const int64_t B = start.count(), G = call.i("kv_heads"), h = call.i("width");
  const auto type = int8 ? S8 : BF16;
  const std::vector<int64_t> k = {B, G, h, slots}, v = {B, G, slots, h};
  if (arrays[0].type != type || arrays[1].type != type || slots % 64 ||
      arrays[0].dims != k || arrays[1].dims != v)
    return "cache";
  for (int i = 2; i < (int8 ? 4 : 2); ++i)
    if (arrays[i].type != F32 || arrays[i].count() != B * G * slots)
      return "scales of a cache";
  if (B < 1 || M % B) return "rows";
  if (start.size() > kLargest) return "";
  for (int64_t b = 0; b < B; ++b) {
    int32_t first;
    memcpy(&first, &start.bytes[4 * b], 4);
    if (first < 0 || first + M / B > slots) return "positions";
  }
  return "";
}

std::string wrong_matmul(const Call& call) {
  const Value &x = call.args[0], &y = call.rets[0];
  const size_t rank = x.dims.size();
  if (rank < 2 || y.dims.size() != rank) return "rank";
  const Matrices kind{call.i("format"), call.b("along_inputs"), call.b("int8")};
  if (x.dims[rank - 2] != y.dims[rank - 2]) return "M";
  if (auto e = kind.wrong(call.args[1], call.args[2], y.dims[rank - 1],
                          x.dims[rank - 1], true);
      !e.empty())
    return e;
  for (int i = 0; i < 3; ++i) {
    const auto& dims = call.args[i].dims;
    const size_t own = i == 2 ? 1 : 2;
    if (dims.size() == own) continue;
    if (dims.size() - own != rank - 2) return "leading axes";
    for (size_t j = 0; j + own < dims.size(); ++j)
      if (dims[j] != 1 && dims[j] != y.dims[j]) return "leading axes";
  }
  return "";
}

std::string wrong_norm(const Call& call) {
  const Value &x = call.args[0], &y = call.rets[0];
  if (!x.is(F32, 2) || y.dims.size() != 2) return "rank";
  const size_t parts = call.args.size() - 2;
  if (parts % 2 || parts < 2 || parts > 6) return "number of matrices";
  const Matrices kind{call.i("format"), call.b("along_inputs"), call.b("int8")};
  int64_t width = 0;
  for (size_t i = 2; i < call.args.size(); i += 2) {
    const Value &data = call.args[i], &scale = call.args[i + 1];
    if (data.dims.size() != 2) return "rank";
    if (auto e = kind.wrong(data, scale, data.dims[0], x.dims[1]); !e.empty())
      return e;
    if (kind.along && scale.dims != call.args[3].dims) return "segments";
    width += data.dims[0];
  }
  if (call.args[1].count() != x.dims[1]) return "gain";
  if (y.dims != std::vector<int64_t>{x.dims[0], width}) return "result";
  return "";
}

std::string wrong_add(const Call& call) {
  const Value &x = call.args[0], &y = call.rets[0], &residual = call.args[4];
  const int halves = call.target == kGated ? 2 : 1;
  if (halves == 2 && (call.i("gate") < 0 || call.i("gate") > 1)) return "gate";
  if (x.dims.size() != 2 || residual.dims.size() != 2) return "rank";
  if (x.dims[1] % halves) return "halves";
  const Matrices kind{call.i("format"), call.b("along_inputs"), call.b("int8")};
  const int64_t K = x.dims[1] / halves, gains = call.args[1].count();
  if (auto e = kind.wrong(call.args[2], call.args[3], residual.dims[1], K);
      !e.empty())
    return e;
  if (gains && gains != K) return "gain";
  if (residual.dims[0] != x.dims[0] || y.dims != residual.dims)
    return "residual";
  return "";
}

std::string wrong_attention(const Call& call) {
  const Value &qkv = call.args[0], &y = call.rets[0];
  if (auto e = wrong_heads(call); !e.empty()) return e;
  const size_t arrays = call.b("int8_cache") ? 4 : 2;
  if (call.args.size() != 4 + arrays || call.rets.size() != 1 + arrays)
    return "number of arrays";
  const int64_t H = call.i("heads"), G = call.i("kv_heads"),
                h = call.i("width");
  const int64_t gains = call.args[1].count();
  if (!qkv.is(F32, 2) || qkv.dims[1] != (H + 2 * G) * h) return "qkv";
  if (y.dims != std::vector<int64_t>{qkv.dims[0], H * h}) return "result";
  if ((gains && gains != h) || call.args[2].count() != gains) return "gains";
  if (call.rets[1].dims.size() != 4) return "cache";
  return wrong_cache(call, &call.rets[1], call.rets[1].dims[3], call.args[3],
                     qkv.dims[0]);
}

// Weights of a layer, data and scale of a matrix apart: the norms that it may
// lack come last, q_gain and k_gain, o_gain, down_gain.
int64_t weights_of(const Call& call) {
  return 16 + 2 * call.b("gains") + call.b("o_gain") + call.b("down_gain");
}

std::string wrong_layers(const Call& call) {
  const Value &x = call.args[0], &y = call.rets[0];
  if (auto e = wrong_heads(call); !e.empty()) return e;
  const int64_t H = call.i("heads"), G = call.i("kv_heads"),
                h = call.i("width"), layers = call.i("layers");
  const int64_t arrays = call.b("int8_cache") ? 4 : 2;
  const int64_t weights = weights_of(call);
  if (call.i("gate") < 0 || call.i("gate") > 1) return "gate";
  if (layers < 1 || layers > 1000 ||
      call.args.size() != size_t(2 + layers * (weights + arrays)) ||
      call.rets.size() != size_t(1 + layers * arrays))
    return "number of layers";
  if (!x.is(F32, 2) || y.dims != x.dims) return "x";
  const int64_t D = x.dims[1];
  const Matrices in{call.i("format"), false, call.b("int8")};
  const Matrices out{in.format, call.b("out_along_inputs"), in.int8};
  const auto vector = [](const Value& value, int64_t n) {
    return value.type == F32 && value.count() == n;
  };
  for (int64_t i = 0; i < layers; ++i) {
    const Value* w = &call.args[2 + i * weights];
    if (!vector(w[0], D) || !vector(w[9], D)) return "norms";
    if (w[10].dims.empty()) return "rank of a matrix";
    const int64_t F = w[10].dims[0];
    const Value* gain = w + 16;
    if (call.b("gains") && (!vector(*gain++, h) || !vector(*gain++, h)))
      return "gains";
    if (call.b("o_gain") && !vector(*gain++, H * h)) return "o_gain";
    if (call.b("down_gain") && !vector(*gain++, F)) return "down_gain";
    for (const auto& e :
         {in.wrong(w[1], w[2], H * h, D), in.wrong(w[3], w[4], G * h, D),
          in.wrong(w[5], w[6], G * h, D), out.wrong(w[7], w[8], D, H * h),
          in.wrong(w[10], w[11], F, D), in.wrong(w[12], w[13], F, D),
          out.wrong(w[14], w[15], D, F)})
      if (!e.empty()) return e;
    const Value* cache = &call.rets[1 + i * arrays];
    if (call.rets[1].dims.size() != 4) return "cache";
    if (auto e = wrong_cache(call, cache, call.rets[1].dims[3], call.args[1],
                             x.dims[0]);
        !e.empty())
      return e;
  }
  return "";
}

std::string wrong(const Call& call) {
  // What the binding of the handler says; the rest has no types there.
  const std::vector<XLA_FFI_DataType> types[kTargets] = {
      {F32},      {F32, F32},           {F32, F32},
      {F32, F32}, {F32, F32, F32, S32}, {F32, S32}};
  const size_t fixed[kTargets] = {3, 0, 5, 5, 0, 0};
  const Target target = call.target;
  if (call.misnamed) return "attributes";
  if (fixed[target] && call.args.size() != fixed[target]) return "arguments";
  if (call.args.size() < types[target].size() || call.rets.empty() ||
      (target < kAttention && call.rets.size() != 1))
    return "arguments";
  for (size_t i = 0; i < types[target].size(); ++i)
    if (call.args[i].type != types[target][i]) return "type";
  if (call.rets[0].type != F32) return "type";
  switch (target) {
    case kMatmul: return wrong_matmul(call);
    case kNorm: return wrong_norm(call);
    case kAdd:
    case kGated:
      return call.args[4].type == F32 ? wrong_add(call) : "type";
    case kAttention: return wrong_attention(call);
    default: return wrong_layers(call);
  }
}

// Memory of the stated size.

class Memory {
 public:
  Memory() {
    for (int i = 0; i < 96; ++i) guarded_.emplace_back(kLargest);
  }
  // In a turn of `used` buffers; `large` ones are not to be touched.
  uint8_t* place(Random& random, const Value& value) {
    const Guarded& guarded = guarded_.at(used_++);
    const int64_t size = value.size();
    if (size > kLargest) return end(guarded);
    if (size == 0 && random.integer(0, 1)) return nullptr;
    const int where = random.integer(0, 3);
    if (where == 0) {
      heap_.push_back(std::make_unique<Block<uint8_t>>(size));
      return heap_.back()->get();
    }
    return where == 1 ? reinterpret_cast<uint8_t*>(guarded.first())
                      : end(guarded) - size;
  }
  void reset() {
    used_ = 0;
    heap_.clear();
  }

 private:
  static uint8_t* end(const Guarded& guarded) {
    return reinterpret_cast<uint8_t*>(guarded.last(0));
  }
  std::vector<Guarded> guarded_;
  std::vector<std::unique_ptr<Block<uint8_t>>> heap_;
  size_t used_ = 0;
};

void fill(Random& random, Value& value) {
  if (value.size() > kLargest) return;
  value.bytes.resize(value.size());
  const int wild = random.integer(0, 19);
  uint64_t state = random.integer(1, INT32_MAX);
  const auto next = [&state] {
    state ^= state << 13;
    state ^= state >> 7;
    return static_cast<uint32_t>((state ^= state << 17) >> 16);
  };
  if (value.type != F32 || wild == 0) {
    for (uint8_t& byte : value.bytes) byte = next();
    if (value.type == BF16)  // mostly finite
      for (size_t i = 1; i < value.bytes.size(); i += 2)
        value.bytes[i] = (value.bytes[i] & 0x80) | 0x3f;
    return;
  }
  for (int64_t i = 0; i < value.count(); ++i) {
    const float x = (static_cast<int32_t>(next()) >> 8) * 0x1p-22f;
    memcpy(&value.bytes[4 * i], &x, 4);
  }
}

// Positions, of which few are wrong.
void fill_start(Random& random, const Call& call, Value& start) {
  if (start.size() > kLargest || start.type != S32) return;
  const auto& cache = call.rets.back();
  const int64_t slots = cache.dims.size() > 2
                            ? std::max(cache.dims[2], cache.dims.back())
                            : 64;
  const int64_t B = std::max<int64_t>(start.count(), 1);
  const int64_t M = call.args[0].dims.empty() ? 1 : call.args[0].dims[0];
  const int64_t last = std::clamp<int64_t>(slots - M / B, 0, 1 << 20);
  const bool spoilt = random.integer(0, 9) == 0;
  for (int64_t b = 0; b < start.count(); ++b) {
    int32_t at = random.integer(0, 3) ? random.integer(0, last) : last;
    if (spoilt && random.integer(0, 1)) {
      const int32_t others[] = {-1, static_cast<int32_t>(last + 1), INT32_MAX,
                                INT32_MIN, 1 << 20};
      at = others[random.integer(0, 4)];
    }
    memcpy(&start.bytes[4 * b], &at, 4);
  }
}

// XLA's side.

long live_errors = 0;

XLA_FFI_Error* new_error(XLA_FFI_Error_Create_Args* args) {
  ++live_errors;
  return new XLA_FFI_Error{args->errc, args->message};
}

XLA_FFI_Error* failure() {
  ++live_errors;
  return new XLA_FFI_Error{XLA_FFI_Error_Code_UNAVAILABLE, "no pool"};
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  using Context = XLA_FFI_InvokeContext;
  if (args->ctx->schedule == Context::kFails) return failure();
  if (args->ctx->schedule == Context::kRuns) {
    args->task(args->data);
  } else {
    args->ctx->pool->schedule(
        [task = args->task, data = args->data] { task(data); });
  }
  return nullptr;
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  if (args->ctx->threads < 0) return failure();
  *args->num_threads = args->ctx->threads;
  return nullptr;
}

const XLA_FFI_Api& api() {
  static const XLA_FFI_Api api = [] {
    XLA_FFI_Api a{};
    a.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    a.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr,
                     XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    a.XLA_FFI_Error_Create = new_error;
    a.XLA_FFI_Error_GetDetails = [](XLA_FFI_Error_GetDetails_Args* args) {
      args->message = args->error->message.c_str();
      args->errc = args->error->code;
    };
    a.XLA_FFI_Error_Destroy = [](XLA_FFI_Error_Destroy_Args* args) {
      --live_errors;
      delete args->error;
    };
    a.XLA_FFI_ThreadPool_Schedule = schedule;
    a.XLA_FFI_ThreadPool_NumThreads = count_threads;
    return a;
  }();
  return api;
}

// A frame's arrays, from values.
template <class Type>
struct Buffers {
  std::vector<XLA_FFI_Buffer> buffers;
  std::vector<void*> pointers;
  std::vector<Type> types;

  explicit Buffers(std::vector<Value>& values) {
    for (Value& value : values)
      buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, value.type,
                         value.data, static_cast<int64_t>(value.dims.size()),
                         value.dims.data()});
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
    types.assign(values.size(), static_cast<Type>(1));
  }
};

// The error's message, or null.
std::unique_ptr<XLA_FFI_Error> invoke(Call& call,
                                      XLA_FFI_InvokeContext& context) {
  XLA_FFI_Handler* const targets[kTargets] = {
      tritera_matmul,           tritera_norm_matmul, tritera_matmul_add,
      tritera_gated_matmul_add, tritera_attention,   tritera_decoder_layers};
  Buffers<XLA_FFI_ArgType> args(call.args);
  Buffers<XLA_FFI_RetType> rets(call.rets);
  const size_t n = call.attrs.size();
  std::vector<XLA_FFI_Scalar> scalars;
  std::vector<XLA_FFI_ByteSpan> names;
  for (auto& [name, attribute] : call.attrs) {
    scalars.push_back({attribute.type, &attribute.i});
    names.push_back({name.data(), name.size()});
  }
  std::vector<void*> attributes;
  std::vector<XLA_FFI_ByteSpan*> spans;
  for (size_t i = 0; i < n; ++i) {
    attributes.push_back(&scalars[i]);
    spans.push_back(&names[i]);
  }
  std::vector<XLA_FFI_AttrType> types(n, XLA_FFI_AttrType_SCALAR);
  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api();
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr,
                static_cast<int64_t>(call.args.size()), args.types.data(),
                args.pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr,
                static_cast<int64_t>(call.rets.size()), rets.types.data(),
                rets.pointers.data()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(n),
                 types.data(), spans.data(), attributes.data()};
  std::unique_ptr<XLA_FFI_Error> error(targets[call.target](&frame));
  if (error) --live_errors;
  return error;
}

// What a call that is in order must give, by the drivers without helpers, in
// buffers of our own.

tritera::Matrix matrix_of(const Value& data, const Value& scale,
                          const Matrices& kind, int64_t K) {
  return {static_cast<tritera::Format>(kind.format),
          data.as<uint8_t>(),
          scale.as<float>(),
          data.dims[data.dims.size() - 2],
          K,
          static_cast<int>(scale.dims.back()),
          kind.along};
}

int64_t product(const std::vector<int64_t>& dims, size_t drop) {
  int64_t n = 1;
  for (size_t i = 0; i + drop < dims.size(); ++i) n *= dims[i];
  return n;
}

// The index in an operand of element `index` of a result's leading axes.
int64_t index_of(const std::vector<int64_t>& result,
                 const std::vector<int64_t>& operand, size_t own,
                 int64_t index) {
  if (operand.size() == own) return 0;
  int64_t at = 0, step = 1;
  for (size_t i = result.size() - 2; i-- > 0;) {
    if (operand[i] > 1) at += index % result[i] * step;
    step *= operand[i];
    index /= result[i];
  }
  return at;
}

void expect_matmul(Call& call, tritera::Team& team,
                   const tritera::Kernel& kernel) {
  const Value &x = call.args[0], &data = call.args[1], &scale = call.args[2];
  const Value& y = call.rets[0];
  if (!y.count()) return;  // an axis may be of any length then
  const Matrices kind{call.i("format"), call.b("along_inputs"), call.b("int8")};
  const int64_t M = x.dims[x.dims.size() - 2], K = x.dims.back();
  const int64_t N = y.dims.back();
  for (int64_t i = 0; i < product(y.dims, 2); ++i) {
    const float* from = x.as<float>() + index_of(y.dims, x.dims, 2, i) * M * K;
    tritera::Product part{matrix_of(data, scale, kind, K),
                          {y.as<float>() + i * M * N, N, nullptr}};
    part.matrix.data +=
        index_of(y.dims, data.dims, 2, i) * N * data.dims.back();
    part.matrix.scale +=
        index_of(y.dims, scale.dims, 1, i) * scale.dims.back();
    // Token by token: a batch may be one call or many.
    for (int64_t t = 0; t < M; ++t) {
      tritera::Product row = part;
      row.output.y += t * N;
      tritera::multiply(
          team, kernel, 1, kind.int8,
          [&](int64_t, float*) { return from + t * K; }, &row, 1);
    }
  }
}

tritera::AttentionShape shape_of(const Call& call, const Value& k) {
  return {static_cast<int>(call.i("heads")),
          static_cast<int>(call.i("kv_heads")),
          static_cast<int>(call.i("width")),
          call.f("theta"),
          call.f("epsilon"),
          call.b("int8_cache") ? tritera::kInt8 : tritera::kBfloat16,
          k.dims[3]};
}

tritera::Cache cache_of(const Value* arrays, bool int8) {
  return {arrays[0].data, arrays[1].data,
          int8 ? arrays[2].as<float>() : nullptr,
          int8 ? arrays[3].as<float>() : nullptr};
}

// `call` has memory of its own here.
void expect(Call& call, const tritera::Kernel& kernel) {
  static const tritera::Helpers none;
  tritera::Team team(none);
  auto& a = call.args;
  float* y = call.rets[0].as<float>();
  if (call.target == kMatmul) return expect_matmul(call, team, kernel);
  const int64_t M = a[0].dims[0], D = a[0].dims[1];
  if (call.target < kAttention) {
    const Matrices kind{call.i("format"), call.b("along_inputs"),
                        call.b("int8")};
    if (call.target == kNorm) {
      std::vector<tritera::Matrix> matrices;
      for (size_t i = 2; i < a.size(); i += 2)
        matrices.push_back(matrix_of(a[i], a[i + 1], kind, D));
      tritera::norm_multiply(team, kernel, M, kind.int8, a[0].as<float>(),
                             a[1].as<float>(), call.f("epsilon"),
                             matrices.data(), matrices.size(), y);
      return;
    }
    const float* gain = a[1].count() ? a[1].as<float>() : nullptr;
    const float epsilon = call.f("epsilon");
    if (call.target == kAdd) {
      tritera::multiply_add(team, kernel, M, kind.int8, a[0].as<float>(), gain,
                            epsilon, matrix_of(a[2], a[3], kind, D),
                            a[4].as<float>(), y);
    } else {
      tritera::gated_multiply_add(
          team, kernel, M, kind.int8, a[0].as<float>(),
          static_cast<tritera::Gate>(call.i("gate")), gain, epsilon,
          matrix_of(a[2], a[3], kind, D / 2), a[4].as<float>(), y);
    }
    return;
  }
  const bool int8_cache = call.b("int8_cache");
  const Value& start = a[call.target == kAttention ? 3 : 1];
  const tritera::Batch batch{start.count(), M / start.count(),
                             start.as<int32_t>()};
  const tritera::AttentionShape shape = shape_of(call, call.rets[1]);
  if (call.target == kAttention) {
    const bool gains = a[1].count();
    tritera::attention(team, kernel, batch, shape, a[0].as<float>(),
                       gains ? a[1].as<float>() : nullptr,
                       gains ? a[2].as<float>() : nullptr,
                       cache_of(&call.rets[1], int8_cache), y);
    return;
  }
  std::copy_n(a[0].as<float>(), M * D, y);
  const int64_t weights = weights_of(call);
  const Matrices in{call.i("format"), false, call.b("int8")};
  const Matrices out{in.format, call.b("out_along_inputs"), in.int8};
  for (int64_t i = 0; i < call.i("layers"); ++i) {
    const Value* w = &a[2 + i * weights];
    const auto of = [&](int at, const Matrices& kind, int64_t K) {
      return matrix_of(w[at], w[at + 1], kind, K);
    };
    const Value* last = w + 16;
    const auto gain = [&](const char* name) {
      return call.b(name) ? (last++)->as<float>() : nullptr;
    };
    const int64_t F = w[10].dims[0];
    // Braces take them in this order.
    const tritera::LayerWeights layer{
        w[0].as<float>(),
        w[9].as<float>(),
        of(1, in, D),
        of(3, in, D),
        of(5, in, D),
        of(7, out, int64_t{shape.heads} * shape.width),
        of(10, in, D),
        of(12, in, D),
        of(14, out, F),
        gain("gains"),
        gain("gains"),
        gain("o_gain"),
        gain("down_gain")};
    tritera::layer(team, kernel, batch, shape,
                   static_cast<tritera::Gate>(call.i("gate")), in.int8, layer,
                   cache_of(&call.rets[1 + i * (int8_cache ? 4 : 2)],
                            int8_cache),
                   y);
  }
}

// Bits, except that any NaN is as good as another.
bool same(const Value& a, const Value& b) {
  if (a.type != F32 || a.size() % 4) return !memcmp(a.data, b.data, a.size());
  for (int64_t i = 0; i < a.count(); ++i)
    if (!same_bits(a.as<float>()[i], b.as<float>()[i])) return false;
  return true;
}

uint64_t call_seed;

void report_signal(int signal) {
  char text[100];
  const int n = snprintf(text, sizeof text, "signal %d in call %llu\n", signal,
                         static_cast<unsigned long long>(call_seed));
  if (write(2, text, n) != n) _exit(4);
  _exit(3);
}

std::string describe(const Call& call) {
  std::string text = kTargetNames[call.target];
  const auto add = [&](const std::vector<Value>& values) {
    for (const Value& value : values) {
      text += " " + std::to_string(value.type) + "[";
      for (int64_t d : value.dims) text += std::to_string(d) + ",";
      text += "]";
    }
  };
  add(call.args);
  text += " ->";
  add(call.rets);
  for (const auto& [name, a] : call.attrs)
    text += " " + name + "=" +
            (a.type == S64    ? std::to_string(a.i)
             : a.type == F32  ? std::to_string(a.f)
             : a.type == PRED ? std::to_string(a.b)
                              : "of another type");
  return text;
}

class Fuzzer {
 public:
  Fuzzer() {
    using Context = XLA_FFI_InvokeContext;
    for (const auto& [threads, told, delay, schedule] :
         {std::tuple{0, -1, 0, Context::kFails}, {0, 0, 0, Context::kFails},
          {0, 1, 0, Context::kAdds}, {1, 2, 0, Context::kAdds},
          {3, 4, 0, Context::kAdds}, {2, 3, 300, Context::kAdds},
          {0, 3, 0, Context::kAdds}, {0, 3, 0, Context::kRuns},
          {0, 3, 0, Context::kFails}}) {
      pools_.push_back(std::make_unique<Pool>(threads, delay));
      contexts_.push_back({pools_.back().get(), told, schedule});
    }
    for (const char* name : {"portable", "avx2", "avx512", "amx", "neon",
                             "neon_i8mm"})
      if (tritera::select_kernel(name)) kernels_.push_back(name);
  }

  void call(uint64_t seed) {
    call_seed = seed;
    Random random(seed * 2654435761 % 4294967291);
    Call call = some_call(random);
    for (int n = random.integer(-2, 2); n > 0; --n) {
      Call other = call;
      spoil(random, other);
      if (possible(other)) call = std::move(other);
    }
    for (auto* values : {&call.args, &call.rets})
      for (Value& value : *values) fill(random, value);
    const size_t at = call.target == kAttention ? 3 : 1;
    if (call.target >= kAttention && call.args.size() > at)
      fill_start(random, call, call.args[at]);
    const std::string why = wrong(call);
    const char* name = kTargetNames[call.target];
    bool there = true;
    for (const auto* values : {&call.args, &call.rets})
      for (const Value& value : *values)
        there = there && value.size() <= kLargest;
    if (why.empty() && !there) {
      ++too_large_;
      return;
    }
    memory_.reset();
    lay_out(random, call);
    tritera::select_kernel(
        kernels_[random.integer(0, kernels_.size() - 1)].c_str());
    auto& context = contexts_[random.integer(0, contexts_.size() - 1)];
    alarm(60);
    const auto error = invoke(call, context);
    alarm(0);
    const std::string all = describe(call);
    const std::string what =
        std::to_string(seed) + " " + (why.empty() ? "valid" : why) + ": " +
        (error ? error->message : "") + "; " + all.substr(0, 600);
    if (why.empty())
      tally_.equal(std::string(name) + " accepted", !error, what.c_str());
    else
      tally_.equal(std::string(name) + " refused", error != nullptr,
                   what.c_str());
    if (error) {
      ++messages_[error->message.substr(0, error->message.find_first_of(
                                               "0123456789["))];
      tally_.equal(std::string(name) + " untouched", untouched(call, true),
                   what.c_str());
      return;
    }
    tally_.equal(std::string(name) + " arguments", untouched(call, false),
                 what.c_str());
    if (!why.empty()) return;
    Call wanted = call;
    std::vector<std::unique_ptr<Block<uint8_t>>> own;
    for (auto* values : {&wanted.args, &wanted.rets}) {
      for (Value& value : *values) {
        own.push_back(std::make_unique<Block<uint8_t>>(value.bytes));
        value.data = own.back()->get();
        if (value.alias >= 0) value.data = wanted.args[value.alias].data;
      }
    }
    expect(wanted, tritera::active_kernel());
    bool right = true;
    for (size_t i = 0; i < call.rets.size(); ++i)
      right = right && same(call.rets[i], wanted.rets[i]);
    tally_.equal(std::string(name) + " results", right, what.c_str());
  }

  bool report() const {
    for (const auto& [message, count] : messages_)
      printf("%8ld refused: %s\n", count, message.c_str());
    printf("%8ld calls too large to make, %ld errors not destroyed\n",
           too_large_, live_errors);
    return tally_.report() || live_errors;
  }

 private:
  void lay_out(Random& random, Call& call) {
    for (auto* values : {&call.args, &call.rets}) {
      for (Value& value : *values) {
        if (value.alias >= 0) {
          value.data = call.args[value.alias].data;
          value.bytes = call.args[value.alias].bytes;
          continue;
        }
        value.data = memory_.place(random, value);
        if (!value.bytes.empty())
          memcpy(value.data, value.bytes.data(), value.bytes.size());
      }
    }
  }

  // Whether the arguments, and `results`, are as they were.
  static bool untouched(const Call& call, bool results) {
    std::vector<bool> written(call.args.size(), false);
    for (const Value& value : call.rets)
      if (value.alias >= 0) written[value.alias] = !results;
    for (size_t i = 0; i < call.args.size(); ++i)
      if (!written[i] && !as_it_was(call.args[i])) return false;
    for (const Value& value : call.rets)
      if (results && !as_it_was(value)) return false;
    return true;
  }
  static bool as_it_was(const Value& value) {
    return value.bytes.empty() ||
           !memcmp(value.data, value.bytes.data(), value.bytes.size());
  }

  std::vector<std::unique_ptr<Pool>> pools_;
  std::vector<XLA_FFI_InvokeContext> contexts_;
  std::vector<std::string> kernels_;
  Memory memory_;
  Tally tally_;
  std::map<std::string, long> messages_;
  long too_large_ = 0;
};

}  // namespace
}  // namespace testing

int main(int argc, char** argv) {
  const long calls = argc > 1 ? atol(argv[1]) : 100000;
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  for (int kind : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM})
    signal(kind, testing::report_signal);
  testing::Fuzzer fuzzer;
  for (long i = 0; i < calls; ++i) fuzzer.call(seed + i);
  return fuzzer.report() ? 1 : 0;
}
