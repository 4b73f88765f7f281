// Tensors of the three float dtypes, read as float32: parameters and pixels.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
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

// Of x's dtype. Past the dispatcher, which would cost a small call a third of its time.
inline Tensor empty_strided(const Tensor& x, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle out;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      x.dim(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// Contiguous and of x's shape, but for the last dimension.
inline Tensor empty_rows(const Tensor& x, int64_t width) {
  std::vector<int64_t> sizes(static_cast<size_t>(x.dim())), strides(sizes.size());
  int64_t step = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    sizes[d] = d == x.dim() - 1 ? width : x.size(d);
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes[d]);
  }
  return empty_strided(x, sizes, strides);
}

// Per channel or per sample and channel: (C,) or (N, C), as dense float32 that `row(n)` points to.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& given, const Tensor& x, int64_t channels) {
    if (!given.has_value()) {
      return;
    }
    const int64_t last = given->dim() - 1;
    STD_TORCH_CHECK(given->scalar_type() == x.scalar_type() && given->is_cpu() && last >= 0 &&
                        given->size(last) == channels &&
                        (last == 0 || (last == 1 && given->size(0) == x.size(0))),
                    "expected parameters of x's dtype, one for each channel");
    const bool dense = channels <= 1 || given->stride(last) == 1;
    tensor_ = dense ? *given : torch::stable::contiguous(*given);
    step_ = last == 1 ? tensor_->stride(0) : 0;
    data_ = static_cast<const float*>(tensor_->const_data_ptr());
    if (tensor_->scalar_type() != ScalarType::Float) {
      convert(last == 1 ? tensor_->size(0) : 1, channels);
    }
  }

  // Sample n's values, or null where there are none.
  const float* row(int64_t n) const { return data_ == nullptr ? nullptr : data_ + n * step_; }

 private:
  void convert(int64_t samples, int64_t channels) {
    values_.resize(static_cast<size_t>(samples * channels));
    const auto* data = static_cast<const uint16_t*>(tensor_->const_data_ptr());
    for (int64_t n = 0; n < samples; ++n) {
      read_floats(tensor_->scalar_type(), data + n * step_, channels,
                  values_.data() + n * channels);
    }
    step_ = step_ == 0 ? 0 : channels;
    data_ = values_.data();
  }

  std::optional<Tensor> tensor_;
  const float* data_ = nullptr;
  int64_t step_ = 0;
  std::vector<float> values_;
};

}  // namespace
