// Tensors of the three float dtypes, read as float32: parameters and pixels.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "float16.h"
#include "scratch.h"

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

// Contiguous and of x's shape.
inline Tensor empty_rows(const Tensor& x) {
  return empty_rows(x, x.dim() == 0 ? 1 : x.size(x.dim() - 1));
}

// Per channel or per sample and channel: (C,) or (N, C), as dense float32 that `row(n)` points to.
// What is converted lies in the calling thread's memory: `place` says which, of four.
class Parameter {
 public:
  Parameter(const std::optional<Tensor>& given, const Tensor& x, int64_t channels, int place) {
    if (!given.has_value()) {
      return;
    }
    const int64_t last = given->dim() - 1;
    STD_TORCH_CHECK(given->scalar_type() == x.scalar_type() && given->is_cpu() && last >= 0 &&
                        given->size(last) == channels &&
                        (last == 0 || (last == 1 && given->size(0) == x.size(0))),
                    "expected parameters of x's dtype, one for each channel");
    const bool dense = channels <= 1 || given->stride(last) == 1;
    step_ = last == 1 ? given->stride(0) : 0;
    data_ = static_cast<const float*>(given->const_data_ptr());
    if (!dense || given->scalar_type() != ScalarType::Float) {
      convert(*given, last == 1 ? given->size(0) : 1, channels, dense, place);
    }
  }

  // Sample n's values, or null where there are none.
  const float* row(int64_t n) const { return data_ == nullptr ? nullptr : data_ + n * step_; }

 private:
  void convert(const Tensor& given, int64_t samples, int64_t channels, bool dense, int place) {
    float* const values =
        heatsink::thread_scratch(samples * channels, heatsink::kParameters + place);
    const ScalarType dtype = given.scalar_type();
    const int64_t bytes = element_bytes(dtype);
    const int64_t between = given.stride(given.dim() - 1) * bytes;
    const auto* data = static_cast<const char*>(given.const_data_ptr());
    for (int64_t n = 0; n < samples; ++n) {
      const char* from = data + n * step_ * bytes;
      float* to = values + n * channels;
      if (dense) {
        read_floats(dtype, from, channels, to);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        read_floats(dtype, from + c * between, 1, to + c);
      }
    }
    step_ = step_ == 0 ? 0 : channels;
    data_ = values;
  }

  const float* data_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace
