// Tensors of the three float dtypes, read as float32: parameters and pixels.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "float16.h"

namespace {

using torch::stable::Tensor;

inline int64_t element_bytes(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline void check_float(const Tensor& x, const char* name) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
      name, ": expected float16, bfloat16 or float32");
}

// Per channel or per sample and channel: (C,) or (N, C), as dense float32 that `row(n)` points to.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& given, const Tensor& x, int64_t channels) {
    if (!given.has_value()) {
      return;
    }
    const Tensor& tensor = *given;
    STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.is_cpu() &&
                        tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == channels &&
                        (tensor.dim() == 1 || (tensor.dim() == 2 && tensor.size(0) == x.size(0))),
                    "expected parameters of x's dtype, one for each channel");
    channels_ = channels;
    samples_ = tensor.dim() == 2 ? tensor.size(0) : 1;
    const bool dense = channels <= 1 || tensor.stride(tensor.dim() - 1) == 1;
    const Tensor rows = dense ? tensor : torch::stable::contiguous(tensor);
    const int64_t bytes = element_bytes(rows.scalar_type());
    const int64_t step = samples_ > 1 ? rows.stride(0) * bytes : 0;
    values_.resize(static_cast<size_t>(samples_ * channels));
    const char* data = static_cast<const char*>(rows.const_data_ptr());
    for (int64_t n = 0; n < samples_; ++n) {
      read_floats(rows.scalar_type(), data + n * step, channels, values_.data() + n * channels);
    }
  }

  // Sample n's values, or null where there are none.
  const float* row(int64_t n) const {
    return values_.empty() ? nullptr : values_.data() + (samples_ > 1 ? n * channels_ : 0);
  }

 private:
  int64_t channels_ = 0;
  int64_t samples_ = 0;
  std::vector<float> values_;
};

}  // namespace
