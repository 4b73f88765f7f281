// heatsink::rms_norm on the CPU: division by the root of the mean square over the last dimension.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "row_norm.h"

namespace {

HEATSINK_CLONES void rms_norm_row(const float* __restrict x, int64_t width, double eps,
                                  const float* __restrict weight, float* __restrict out) {
  const double squares = sum_row<true>(x, width, 0.0f);
  const auto inverse =
      static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
  if (weight == nullptr) {
    for (int64_t c = 0; c < width; ++c) {
      out[c] = x[c] * inverse;
    }
    return;
  }
  for (int64_t c = 0; c < width; ++c) {
    out[c] = x[c] * inverse * weight[c];
  }
}

// x: (..., C) in any strides; weight: (C,). Returns contiguous.
Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected (..., C), got no dimensions");
  Tensor out = empty_rows(x, x.size(x.dim() - 1));
  if (x.numel() == 0) {
    return out;
  }
  const int64_t width = x.size(x.dim() - 1);
  const Parameter weights(weight, x, width);
  for_each_row(x, out, [&](int64_t, const float* values, float* results) {
    rms_norm_row(values, width, eps, weights.row(0), results);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }
