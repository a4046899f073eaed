// SPDX-License-Identifier: Apache-2.0
// ternary_matmul as an XLA custom call.
#include "ffi.h"

#include <limits>
#include <utility>

#include "dispatch.h"

namespace tritera {

ffi::Error read_matrix(ffi::AnyBuffer data, ffi::AnyBuffer scale,
                       const MatrixKind& kind, int64_t inputs,
                       Matrix* matrix) {
  const auto [format, along_inputs, int8] = kind;
  if (format < 0 || format >= kFormats)
    return refuse("unknown format " + std::to_string(format));
  if (format == kByte && !int8)
    return refuse("a byte matrix takes int8 activations");
  const auto d = data.dimensions();
  const auto s = scale.dimensions();
  if (data.element_type() != ffi::U8 || d.size() < 2)
    return refuse("packed data of shape " + shape_of(d) + " is no uint8 matrix");
  if (scale.element_type() != ffi::F32 || s.size() < 1 || s.back() < 1)
    return refuse("scale of shape " + shape_of(s) + " is no float32 vector");
  const int64_t N = d[d.size() - 2], blocks = s.back();
  const int64_t length = along_inputs ? inputs : N;
  if (inputs < 1 || N < 1 || length % blocks)
    return refuse(std::to_string(blocks) + " scales for a matrix of " +
                  std::to_string(N) + " x " + std::to_string(inputs));
  // Past this an int32 sum could overflow.
  const int64_t most = format == kByte ? 1 << 16 : 1 << 22;
  if (inputs > most)
    return refuse("K = " + std::to_string(inputs) + " exceeds " +
                  std::to_string(most));
  if (blocks > std::numeric_limits<int>::max())
    return refuse("a matrix of " + std::to_string(blocks) + " scales");
  *matrix = {static_cast<Format>(format),
             static_cast<const uint8_t*>(data.untyped_data()),
             static_cast<const float*>(scale.untyped_data()),
             N,
             inputs,
             static_cast<int>(blocks),
             along_inputs};
  if (d.back() != static_cast<int64_t>(matrix->row_bytes()))
    return refuse("packed rows of " + std::to_string(d.back()) +
                  " bytes, wanted " + std::to_string(matrix->row_bytes()));
  return ffi::Error::Success();
}

namespace {

// Where the matrix of a batch index starts in an operand whose leading axes
// are those of the result, or 1 (vmap's expand_dims).
int64_t operand_index(ffi::AnyBuffer::Dimensions result,
                      ffi::AnyBuffer::Dimensions operand, size_t own,
                      int64_t index) {
  const size_t leading = result.size() - 2;
  int64_t at = 0, step = 1;
  for (size_t i = leading; i-- > 0;) {
    const int64_t here = index % result[i];
    index /= result[i];
    const int64_t size = i < operand.size() - own ? operand[i] : 1;
    if (size > 1) at += here * step;
    step *= size;
  }
  return at;
}

ffi::Error check_leading(ffi::AnyBuffer::Dimensions result,
                         ffi::AnyBuffer::Dimensions operand, size_t own) {
  if (operand.size() == own) return ffi::Error::Success();
  bool fits = operand.size() - own == result.size() - 2;
  for (size_t i = 0; fits && i + own < operand.size(); ++i)
    fits = operand[i] == 1 || operand[i] == result[i];
  if (fits) return ffi::Error::Success();
  return refuse("operand " + shape_of(operand) + " does not fit result " +
                shape_of(result));
}

ffi::Error ternary_matmul(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer data,
                          ffi::AnyBuffer scale, F32Result y, int64_t format,
                          bool along_inputs, bool int8) {
  const auto dx = x.dimensions(), dy = y->dimensions();
  if (dx.size() < 2 || dy.size() != dx.size())
    return refuse("x of shape " + shape_of(dx) + ", result " + shape_of(dy));
  Matrix matrix;
  const int64_t M = dx[dx.size() - 2], K = dx.back(), N = dy.back();
  if (auto e = read_matrix(data, scale, {format, along_inputs, int8}, K,
                           &matrix);
      e.failure())
    return e;
  if (matrix.outputs != N || dy[dy.size() - 2] != M)
    return refuse("result " + shape_of(dy) + " of x " + shape_of(dx) + " and " +
                  shape_of(data.dimensions()));
  const auto dd = data.dimensions(), ds = scale.dimensions();
  for (const auto& [dimensions, own] :
       {std::pair{dx, size_t{2}}, {dd, size_t{2}}, {ds, size_t{1}}}) {
    if (auto e = check_leading(dy, dimensions, own); e.failure()) return e;
  }
  if (!y->element_count()) return ffi::Error::Success();
  const Helpers helpers = helpers_of(pool);
  Team team(helpers);
  const Kernel& kernel = active_kernel();
  const int64_t batch = y->element_count() / (M * N);
  const bool one_matrix =
      static_cast<int64_t>(data.element_count()) == dd.back() * N &&
      static_cast<int64_t>(scale.element_count()) == ds.back() &&
      static_cast<int64_t>(x.element_count()) == batch * M * K;
  const int64_t calls = one_matrix ? 1 : batch;
  for (int64_t i = 0; i < calls; ++i) {
    const float* from = x.typed_data() + operand_index(dy, dx, 2, i) * M * K;
    Product product{matrix, {y->typed_data() + i * M * N, N, nullptr}};
    product.matrix.data += operand_index(dy, dd, 2, i) * N * dd.back();
    product.matrix.scale += operand_index(dy, ds, 1, i) * ds.back();
    multiply(
        team, kernel, one_matrix ? batch * M : M, int8,
        [&](int64_t t, float*) { return from + t * K; }, &product, 1);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tritera

#define TRITERA_EXPORT __attribute__((visibility("default")))

// Declared first: the build hides symbols.
extern "C" {
TRITERA_EXPORT XLA_FFI_Error* tritera_matmul(XLA_FFI_CallFrame*);
TRITERA_EXPORT int tritera_ffi_api_major() { return XLA_FFI_API_MAJOR; }
TRITERA_EXPORT int tritera_ffi_api_minor() { return XLA_FFI_API_MINOR; }
TRITERA_EXPORT const char* tritera_kernel() {
  return tritera::active_kernel().name;
}
TRITERA_EXPORT bool tritera_select(const char* name) {
  return tritera::select_kernel(name);
}
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(tritera_matmul, tritera::ternary_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<tritera::F32>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<tritera::F32>()
                                  .Attr<int64_t>("format")
                                  .Attr<bool>("along_inputs")
                                  .Attr<bool>("int8"));
