// SPDX-License-Identifier: Apache-2.0
// What XLA's custom calls have in common.
#pragma once

#include <string>

#include "matmul.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace tritera {

namespace ffi = xla::ffi;

using F32 = ffi::Buffer<ffi::F32>;
using F32Result = ffi::ResultBuffer<ffi::F32>;

inline Helpers helpers_of(ffi::ThreadPool& pool) {
  return {static_cast<int>(pool.num_threads()) - 1,
          [&pool](std::function<void()> task) {
            pool.Schedule(std::move(task));
          }};
}

inline ffi::Error refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("tritera: " + what);
}

inline std::string shape_of(ffi::AnyBuffer::Dimensions dimensions) {
  std::string text = "[";
  for (const int64_t d : dimensions)
    text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

// What a call says of its matrices.
struct MatrixKind {
  int64_t format;
  bool along_inputs;
  bool int8;  // activations
};

// Fills `matrix` from a packed buffer [N, bytes a row] and its scales, and
// checks that they fit; `inputs` is K.
ffi::Error read_matrix(ffi::AnyBuffer data, ffi::AnyBuffer scale,
                       const MatrixKind& kind, int64_t inputs, Matrix* matrix);

}  // namespace tritera
