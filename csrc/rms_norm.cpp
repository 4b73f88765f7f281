// heatsink::rms_norm on the CPU: division by the root of the mean square over the last dimension.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "recorder.h"
#include "row_norm.h"

namespace {

// `out` may be x itself.
HEATSINK_CLONES void rms_norm_row(const float* x, int64_t width, double eps,
                                  const float* __restrict weight, float* out) {
  const double squares = sum_row<true>(x, width, 0.0f);
  const auto inverse =
      static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
  if (weight == nullptr) {
    HEATSINK_INDEPENDENT
    for (int64_t c = 0; c < width; ++c) {
      out[c] = x[c] * inverse;
    }
    return;
  }
  HEATSINK_INDEPENDENT
  for (int64_t c = 0; c < width; ++c) {
    out[c] = x[c] * inverse * weight[c];
  }
}

// x: (..., C) in any strides; weight: (C,).
void normalise(const Tensor& x, const std::optional<Tensor>& weight, double eps, Tensor& out) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected (..., C), got no dimensions");
  if (x.numel() == 0) {
    return;
  }
  const int64_t width = x.size(x.dim() - 1);
  const Parameter weights(weight, x, width, 0);
  const Rows to = rows_of_out(out);
  for_each_row(rows_of(x), to, x.scalar_type(), [&](int64_t, const float* values, float* results) {
    rms_norm_row(values, width, eps, weights.row(0), results);
  });
}

// Returns contiguous.
Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps) {
  Tensor out = empty_rows(x);
  normalise(x, weight, eps, out);
  return out;
}

// `out` may be x itself.
void rms_norm_out(Tensor x, std::optional<Tensor> weight, double eps, Tensor out) {
  check_out(out, x);
  check_in_place_or_apart(out, x, "x");
  check_apart(out, weight, "weight");
  normalise(x, weight, eps, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_out", HEATSINK_RECORDABLE(rms_norm_out));
}
