// GroupNorm on one chunk of a sample's pixels, float32, channels innermost.
//
// Every sum has one order: a channel's even pixels, its odd pixels, then both together; then every
// fourth channel of a group, and those four. kernels/group_norm_silu.py does the same.

#pragma once

#include <cmath>

#include "vector_math.h"

namespace {

constexpr int64_t kNarrow = 8;
typedef float Narrow __attribute__((vector_size(kNarrow * sizeof(float))));
typedef float Four __attribute__((vector_size(4 * sizeof(float))));

// What a chunk knows of each group.
struct Moments {
  float mean;
  float m2;  // sum of squared distances from the mean
};

// Sums over pixels of (x - center)^2, or of x where there is no center, for Width vectors. Those
// are as wide as AVX2's registers: of wider ones, GCC keeps arrays in memory there.
template <int Width, bool Squared>
HEATSINK_INLINE void sum_vectors(const float* x, int64_t stride, int64_t pixels,
                                 const float* center, float* sums) {
  Narrow even[Width] = {};
  Narrow odd[Width] = {};
  Narrow middle[Width] = {};
  for (int v = 0; v < Width && Squared; ++v) {
    std::memcpy(&middle[v], center + v * kNarrow, sizeof middle[v]);
  }
  int64_t p = 0;
  for (; p + 1 < pixels; p += 2) {
    for (int v = 0; v < Width; ++v) {
      Narrow first, second;
      std::memcpy(&first, x + p * stride + v * kNarrow, sizeof first);
      std::memcpy(&second, x + (p + 1) * stride + v * kNarrow, sizeof second);
      if (Squared) {
        first -= middle[v];
        second -= middle[v];
        first *= first;
        second *= second;
      }
      even[v] += first;
      odd[v] += second;
    }
  }
  for (int v = 0; v < Width; ++v) {
    if (p < pixels) {
      Narrow last;
      std::memcpy(&last, x + p * stride + v * kNarrow, sizeof last);
      if (Squared) {
        last -= middle[v];
        last *= last;
      }
      even[v] += last;
    }
    even[v] += odd[v];
    std::memcpy(sums + v * kNarrow, &even[v], sizeof even[v]);
  }
}

// The same for channels that do not fill a vector.
template <bool Squared>
HEATSINK_INLINE void sum_channel(const float* x, int64_t stride, int64_t pixels,
                                 const float* center, float* sums) {
  float parts[2] = {0.0f, 0.0f};
  for (int64_t p = 0; p < pixels; ++p) {
    const float distance = Squared ? x[p * stride] - center[0] : x[p * stride];
    parts[p % 2] += Squared ? distance * distance : distance;
  }
  sums[0] = parts[0] + parts[1];
}

template <bool Squared>
HEATSINK_INLINE void sum_pixels(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                                const float* center, float* sums) {
  int64_t c = 0;
  for (; c + 4 * kNarrow <= channels; c += 4 * kNarrow) {
    sum_vectors<4, Squared>(x + c, stride, pixels, center + c, sums + c);
  }
  for (; c + kNarrow <= channels; c += kNarrow) {
    sum_vectors<1, Squared>(x + c, stride, pixels, center + c, sums + c);
  }
  for (; c < channels; ++c) {
    sum_channel<Squared>(x + c, stride, pixels, center + c, sums + c);
  }
}

// Four sums of every fourth channel of a group, so that none waits long for the one before.
HEATSINK_INLINE float sum_group(const float* sums, int64_t size) {
  Four parts = {};
  Four some;
  int64_t j = 0;
  for (; j + 4 <= size; j += 4) {
    std::memcpy(&some, sums + j, sizeof some);
    parts += some;
  }
  if (j < size) {
    // Adding 0 changes nothing: a sum that began at 0 is never -0.
    float rest[4] = {};
    for (int64_t k = 0; j + k < size; ++k) {
      rest[k] = sums[j + k];
    }
    std::memcpy(&some, rest, sizeof some);
    parts += some;
  }
  return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

// `value` for every channel of a group; groups are too small for what fill_n has to decide.
HEATSINK_INLINE void spread(float value, int64_t size, float* to) {
  const Four values = {value, value, value, value};
  int64_t j = 0;
  for (; j + 4 <= size; j += 4) {
    std::memcpy(to + j, &values, sizeof values);
  }
  for (; j < size; ++j) {
    to[j] = value;
  }
}

// Mean and M2 of each group of a chunk; `scratch` holds 2 * channels floats.
HEATSINK_CLONES void chunk_moments(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                                   int64_t groups, float* scratch, Moments* moments) {
  const int64_t size = channels / groups;
  const float count = static_cast<float>(pixels * size);
  float* sums = scratch;
  float* center = scratch + channels;
  sum_pixels<false>(x, stride, pixels, channels, center, sums);
  for (int64_t g = 0; g < groups; ++g) {
    moments[g].mean = sum_group(sums + g * size, size) / count;
    spread(moments[g].mean, size, center + g * size);
  }
  sum_pixels<true>(x, stride, pixels, channels, center, sums);
  for (int64_t g = 0; g < groups; ++g) {
    moments[g].m2 = sum_group(sums + g * size, size);
  }
}

// A chunk of `added` values more, to the mean and M2 of `count`.
HEATSINK_CLONES void merge(const Moments* parts, int64_t groups, double count, double added,
                           double* __restrict mean, double* __restrict m2) {
  const double share = added / (count + added);
  for (int64_t g = 0; g < groups; ++g) {
    const double distance = parts[g].mean - mean[g];
    mean[g] = mean[g] + distance * share;
    m2[g] = m2[g] + (parts[g].m2 + distance * distance * (count * share));
  }
}

// Per channel; each may be null.
struct Affine {
  const float *weight, *bias, *scale, *shift;
};

// Per channel: y = (x - mean) * gain + offset.
struct Coefficients {
  float* mean;
  float* gain;
  float* offset;
};

// What each channel is to be multiplied with and moved by.
HEATSINK_CLONES void fold(const double* mean, double* __restrict m2, int64_t groups, double count,
                          double eps, int64_t channels, const Affine& affine,
                          const Coefficients& by) {
  const int64_t size = channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    m2[g] = 1.0 / std::sqrt(m2[g] / count + eps);
  }
  for (int64_t g = 0; g < groups; ++g) {
    spread(static_cast<float>(mean[g]), size, by.mean + g * size);
    spread(static_cast<float>(m2[g]), size, by.gain + g * size);
  }
  float* __restrict gain = by.gain;
  float* __restrict offset = by.offset;
  for (int64_t c = 0; c < channels; ++c) {
    gain[c] *= affine.weight == nullptr ? 1.0f : affine.weight[c];
    offset[c] = affine.bias == nullptr ? 0.0f : affine.bias[c];
  }
  for (int64_t c = 0; c < channels && affine.scale != nullptr; ++c) {
    gain[c] *= 1.0f + affine.scale[c];
    offset[c] *= 1.0f + affine.scale[c];
  }
  for (int64_t c = 0; c < channels && affine.shift != nullptr; ++c) {
    offset[c] += affine.shift[c];
  }
}

template <bool Silu, typename Float, typename Int, typename Word>
HEATSINK_INLINE void apply_at(const float* x, const Coefficients& by, int64_t c, float* out) {
  Float y, mean, gain, offset;
  std::memcpy(&y, x + c, sizeof y);
  std::memcpy(&mean, by.mean + c, sizeof y);
  std::memcpy(&gain, by.gain + c, sizeof y);
  std::memcpy(&offset, by.offset + c, sizeof y);
  y = (y - mean) * gain + offset;
  if (Silu) {
    silu<Float, Int, Word>(y);
  }
  std::memcpy(out + c, &y, sizeof y);
}

// In memory's order: what the processor fetches ahead counts for more than the coefficients' loads.
template <bool Silu>
HEATSINK_INLINE void apply(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                           const Coefficients& given, float* out, int64_t out_stride) {
  // A copy, so that no store can be taken to change it.
  const Coefficients by = given;
  for (int64_t p = 0; p < pixels; ++p) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      apply_at<Silu, Vector, Ints, Words>(x + p * stride, by, c, out + p * out_stride);
    }
    for (; c < channels; ++c) {
      apply_at<Silu, float, int32_t, uint32_t>(x + p * stride, by, c, out + p * out_stride);
    }
  }
}

HEATSINK_CLONES void apply_silu(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                                const Coefficients& by, float* out, int64_t out_stride) {
  apply<true>(x, stride, pixels, channels, by, out, out_stride);
}

HEATSINK_CLONES void apply_affine(const float* x, int64_t stride, int64_t pixels, int64_t channels,
                                  const Coefficients& by, float* out, int64_t out_stride) {
  apply<false>(x, stride, pixels, channels, by, out, out_stride);
}

}  // namespace
