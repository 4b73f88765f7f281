// Normalisation over a tensor's last dimension: rows one by one, and their sums.
//
// A row's sum has one order: element i goes to lane i mod 64, in order of i; then lane j takes lane
// j + 32, then + 16, + 8, + 4, + 2, + 1. kernels/_rows.py does the same.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "float_tensor.h"
#include "rows.h"
#include "scratch.h"
#include "vector_math.h"

namespace {

typedef float Half __attribute__((vector_size(kLanes * sizeof(float) / 2)));
typedef float Quarter __attribute__((vector_size(kLanes * sizeof(float) / 4)));

constexpr int64_t kUnrolled = 4;     // vectors summed side by side
constexpr int64_t kRowGrain = 8192;  // values a thread should have at least

template <bool Squared>
HEATSINK_INLINE void add_vector(const float* x, float center, Vector& sum) {
  Vector value;
  std::memcpy(&value, x, sizeof value);
  if (Squared) {
    value -= center;
    value *= value;
  }
  sum += value;
}

// The sum of x, or of (x - center)^2.
template <bool Squared>
HEATSINK_INLINE float sum_row(const float* x, int64_t width, float center) {
  Vector sums[kUnrolled] = {};
  int64_t c = 0;
  for (; c + kUnrolled * kLanes <= width; c += kUnrolled * kLanes) {
    for (int64_t v = 0; v < kUnrolled; ++v) {
      add_vector<Squared>(x + c + v * kLanes, center, sums[v]);
    }
  }
  for (int64_t v = 0; c < width; ++v, c += kLanes) {
    float rest[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      // What is not there counts as its distance 0.
      rest[j] = c + j < width ? x[c + j] : center;
    }
    add_vector<Squared>(rest, Squared ? center : 0.0f, sums[v]);
  }
  sums[0] += sums[2];
  sums[1] += sums[3];
  sums[0] += sums[1];
  Half low, high;
  std::memcpy(&low, &sums[0], sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&sums[0]) + sizeof low, sizeof high);
  low += high;
  Quarter first, second;
  std::memcpy(&first, &low, sizeof first);
  std::memcpy(&second, reinterpret_cast<const char*>(&low) + sizeof first, sizeof second);
  first += second;
  return (first[0] + first[2]) + (first[1] + first[3]);
}

// Calls `normalise(row, values, results)` for every row: float32 in and out, whatever the dtype.
template <typename Normalise>
void for_each_row(const Rows& x, const Rows& out, ScalarType dtype, const Normalise& normalise) {
  const int64_t width = x.width;
  const int64_t grain = std::max<int64_t>(1, kRowGrain / width);
  torch::stable::parallel_for(0, x.count, grain, [&](int64_t begin, int64_t end) {
    float* floats = dtype == ScalarType::Float ? nullptr : heatsink::thread_scratch(2 * width);
    for (int64_t row = begin; row < end; ++row) {
      const char* source = x.row(row);
      char* target = out.row(row);
      if (dtype == ScalarType::Float) {
        normalise(row, reinterpret_cast<const float*>(source), reinterpret_cast<float*>(target));
        continue;
      }
      float* results = floats + width;
      read_floats(dtype, source, width, floats);
      normalise(row, static_cast<const float*>(floats), results);
      write_floats(dtype, results, width, target);
    }
  });
}

}  // namespace
