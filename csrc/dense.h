// Copies of tensors that no kernel reads as they lie, in memory that the calling thread keeps.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "float_tensor.h"
#include "scratch.h"

namespace {

constexpr int64_t kMaxDims = 16;

// A tensor's dimensions in an order of one's own, with strides in elements.
struct Shape {
  int64_t dims = 0;
  int64_t sizes[kMaxDims], strides[kMaxDims];

  void add(const Tensor& x, int64_t d) {
    STD_TORCH_CHECK(dims < kMaxDims, "expected at most ", kMaxDims, " dimensions");
    sizes[dims] = x.size(d);
    strides[dims] = x.stride(d);
    ++dims;
  }
};

// As they are.
inline Shape shape_of(const Tensor& x) {
  Shape shape;
  for (int64_t d = 0; d < x.dim(); ++d) {
    shape.add(x, d);
  }
  return shape;
}

// With the second last.
inline Shape shape_with_channels_last(const Tensor& x) {
  Shape shape;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != 1) {
      shape.add(x, d);
    }
  }
  shape.add(x, 1);
  return shape;
}

// Elements of one size, in the shape's order. The last two dimensions are worked on in tiles, so
// that a cache line that is read is used up, whichever of them lies close in memory.
template <typename Word>
void copy_dense(const Word* from, Shape shape, Word* to) {
  constexpr int64_t kTileRows = 32;
  constexpr int64_t kTileColumns = 64;
  constexpr int64_t kGrain = 8192;  // elements a thread should have at least
  if (shape.dims == 1) {
    shape = {2, {1, shape.sizes[0]}, {0, shape.strides[0]}};
  }
  const int64_t last = shape.dims - 1;
  const int64_t width = shape.sizes[last];
  const int64_t rows = shape.sizes[last - 1];
  const int64_t right = shape.strides[last];
  const int64_t down = shape.strides[last - 1];
  int64_t planes = 1;
  for (int64_t d = 0; d < last - 1; ++d) {
    planes *= shape.sizes[d];
  }
  const int64_t bands = (rows + kTileRows - 1) / kTileRows;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kTileRows * width));
  torch::stable::parallel_for(0, planes * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Word* plane = from;
      int64_t rest = task / bands;
      for (int64_t d = last - 2; d >= 0; --d) {
        plane += rest % shape.sizes[d] * shape.strides[d];
        rest /= shape.sizes[d];
      }
      Word* const target = to + task / bands * rows * width;
      const int64_t first = task % bands * kTileRows;
      const int64_t stop = std::min(first + kTileRows, rows);
      for (int64_t left = 0; left < width; left += kTileColumns) {
        for (int64_t r = first; r < stop; ++r) {
          for (int64_t c = left; c < std::min(left + kTileColumns, width); ++c) {
            target[r * width + c] = plane[r * down + c * right];
          }
        }
      }
    }
  });
}

// x of one of the three float dtypes, dense in the shape's order; until this thread's next call.
inline const char* dense(const Tensor& x, const Shape& shape, int use = heatsink::kDense) {
  const int64_t bytes = element_bytes(x.scalar_type());
  float* memory = heatsink::thread_scratch((x.numel() * bytes + 3) / 4, use);
  if (bytes == 4) {
    copy_dense(static_cast<const uint32_t*>(x.const_data_ptr()), shape,
               reinterpret_cast<uint32_t*>(memory));
  } else {
    copy_dense(static_cast<const uint16_t*>(x.const_data_ptr()), shape,
               reinterpret_cast<uint16_t*>(memory));
  }
  return reinterpret_cast<const char*>(memory);
}

}  // namespace
