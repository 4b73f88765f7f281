// Tensors as rows of their last dimension, dense and at one distance.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include "dense.h"
#include "float_tensor.h"
#include "given_out.h"
#include "scratch.h"

namespace {

// The step between rows if they lie evenly with a dense last dimension, else -1.
inline int64_t row_step(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1) {
    return -1;
  }
  int64_t step = -1;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (x.size(d) == 1) {
      continue;
    }
    if (step >= 0 && x.stride(d) != expected) {
      return -1;
    }
    step = step >= 0 ? step : x.stride(d);
    expected = x.stride(d) * x.size(d);
  }
  return step >= 0 ? step : x.size(last);
}

// Rows in memory; there is at least one, and something in it.
struct Rows {
  char* data;
  int64_t count, width, step;  // step in bytes

  char* row(int64_t r) const { return data + r * step; }
};

// x's rows, copied only where they must be; `use` is which scratch then holds them.
inline Rows rows_of(const Tensor& x, int use = heatsink::kDense) {
  const int64_t width = x.size(x.dim() - 1);
  const int64_t step = row_step(x);
  const char* data =
      step < 0 ? dense(x, shape_of(x), use) : static_cast<const char*>(x.const_data_ptr());
  return {const_cast<char*>(data), x.numel() / width, width,
          (step < 0 ? width : step) * element_bytes(x.scalar_type())};
}

// Those of a result.
inline Rows rows_of_out(Tensor& out) {
  const int64_t width = out.size(out.dim() - 1);
  const int64_t step = row_step(out);
  STD_TORCH_CHECK(step >= 0, "out: expected dense rows at one distance");
  return {static_cast<char*>(out.mutable_data_ptr()), out.numel() / width, width,
          step * element_bytes(out.scalar_type())};
}

}  // namespace
