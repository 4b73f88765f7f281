// heatsink::normal on the CPU: the noise of docs/noise.md for rows of seeds.

#include "noise.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 32;  // tiles a thread should have at least

// keys, steps: (rows,) int64. Returns (rows, count) float32.
Tensor normal(Tensor keys, Tensor steps, int64_t purpose, int64_t count) {
  const auto int64 = torch::headeronly::ScalarType::Long;
  STD_TORCH_CHECK(keys.dim() == 1 && keys.scalar_type() == int64, "keys: expected (rows,) int64");
  STD_TORCH_CHECK(steps.dim() == 1 && steps.scalar_type() == int64 && steps.is_cpu() &&
                      steps.size(0) == keys.size(0),
                  "steps: expected int64 on the CPU, one for each key");
  STD_TORCH_CHECK(count >= 0, "count: expected 0 or more, got ", count);
  const int64_t rows = keys.size(0);
  Tensor out = torch::stable::new_empty(keys, {rows, count}, torch::headeronly::ScalarType::Float);
  const int64_t* key = static_cast<const int64_t*>(keys.const_data_ptr());
  const int64_t* step = static_cast<const int64_t*>(steps.const_data_ptr());
  const int64_t key_stride = keys.stride(0);
  const int64_t step_stride = steps.stride(0);
  float* values = static_cast<float*>(out.mutable_data_ptr());

  const int64_t tiles = (count + kNoiseTile - 1) / kNoiseTile;
  torch::stable::parallel_for(0, rows * tiles, kGrain, [&](int64_t begin, int64_t end) {
    float normals[kNoiseTile];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles;
      const int64_t tile = task % tiles;
      normal_tile(stream_of(key[row * key_stride], step[row * step_stride], purpose), tile,
                  normals);
      const int64_t first = tile * kNoiseTile;
      const int64_t kept = std::min(count - first, kNoiseTile);
      std::copy_n(normals, kept, values + row * count + first);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("normal", TORCH_BOX(&normal)); }
