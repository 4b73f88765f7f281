// heatsink::layer_norm on the CPU: normalisation over the last dimension, modulated per sample.

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "recorder.h"
#include "row_norm.h"

namespace {

// Of one row; each may be null.
struct Affine {
  const float *weight, *bias, *scale, *shift;
};

template <typename Value>
HEATSINK_INLINE void normalise_at(const float* x, float mean, float inverse, const Affine& by,
                                  int64_t c, float* out) {
  Value y, parameter;
  std::memcpy(&y, x + c, sizeof y);
  y = (y - mean) * inverse;
  if (by.weight != nullptr) {
    std::memcpy(&parameter, by.weight + c, sizeof y);
    y *= parameter;
  }
  if (by.bias != nullptr) {
    std::memcpy(&parameter, by.bias + c, sizeof y);
    y += parameter;
  }
  if (by.scale != nullptr) {
    std::memcpy(&parameter, by.scale + c, sizeof y);
    y *= parameter + 1.0f;
  }
  if (by.shift != nullptr) {
    std::memcpy(&parameter, by.shift + c, sizeof y);
    y += parameter;
  }
  std::memcpy(out + c, &y, sizeof y);
}

HEATSINK_CLONES void layer_norm_row(const float* x, int64_t width, double eps, const Affine& by,
                                    float* out) {
  const float mean = sum_row<false>(x, width, 0.0f) / static_cast<float>(width);
  const double m2 = sum_row<true>(x, width, mean);
  const auto inverse = static_cast<float>(1.0 / std::sqrt(m2 / static_cast<double>(width) + eps));
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    normalise_at<Vector>(x, mean, inverse, by, c, out);
  }
  for (; c < width; ++c) {
    normalise_at<float>(x, mean, inverse, by, c, out);
  }
}

using Given = std::optional<Tensor>;

// x: (N, ..., C) in any strides; weight, bias: (C,); scale, shift: (N, C).
void normalise(const Tensor& x, const Given& weight, const Given& bias, double eps,
               const Given& scale, const Given& shift, Tensor& out) {
  check_float(x, "x");
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected (..., C), got no dimensions");
  if (x.numel() == 0) {
    return;
  }
  const int64_t width = x.size(x.dim() - 1);
  const int64_t of_sample = x.numel() / (width * x.size(0));
  const Parameter weights(weight, x, width, 0), biases(bias, x, width, 1);
  const Parameter scales(scale, x, width, 2), shifts(shift, x, width, 3);
  const Rows to = rows_of_out(out);
  for_each_row(
      rows_of(x), to, x.scalar_type(), [&](int64_t row, const float* values, float* results) {
        const int64_t n = of_sample > 0 ? row / of_sample : 0;
        layer_norm_row(values, width, eps,
                       {weights.row(n), biases.row(n), scales.row(n), shifts.row(n)}, results);
      });
}

// Returns contiguous.
Tensor layer_norm(Tensor x, Given weight, Given bias, double eps, Given scale, Given shift) {
  Tensor out = empty_rows(x);
  normalise(x, weight, bias, eps, scale, shift, out);
  return out;
}

// `out` may be x itself.
void layer_norm_out(Tensor x, Given weight, Given bias, double eps, Given scale, Given shift,
                    Tensor out) {
  check_out(out, x);
  check_in_place_or_apart(out, x, "x");
  check_apart(out, weight, "weight");
  check_apart(out, bias, "bias");
  check_apart(out, scale, "scale");
  check_apart(out, shift, "shift");
  normalise(x, weight, bias, eps, scale, shift, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_out", HEATSINK_RECORDABLE(layer_norm_out));
}
