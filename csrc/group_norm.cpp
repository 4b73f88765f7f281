// heatsink::group_norm_silu on the CPU: GroupNorm, its modulation and SiLU, channels innermost.
//
// A sample is cut into chunks of pixels that stay in the first-level cache; how depends on the
// number of channels alone, so that neither threads nor the batch change a bit.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "dense.h"
#include "float_tensor.h"
#include "given_out.h"
#include "group_norm_tile.h"
#include "recorder.h"
#include "scratch.h"

namespace {

constexpr int64_t kChunk = 8192;   // values of a chunk, about
constexpr int64_t kTile = 2048;    // values converted at a time on the way out, about
constexpr int64_t kMinPixels = 8;  // pixels of a chunk, at least
constexpr int64_t kGrain = 8192;   // values a thread should have at least

// Samples of pixels of channels.
struct Pixels {
  char* data;
  int64_t samples, pixels, channels, sample_step, pixel_step;  // steps in elements
  ScalarType dtype;

  char* at(int64_t n, int64_t p) const {
    return data + (n * sample_step + p * pixel_step) * element_bytes(dtype);
  }
};

struct Arguments {
  Parameter weight, bias, scale, shift;
  int64_t groups;
  double eps;
  bool silu;
};

// A thread's memory.
struct Work {
  double* merged;       // mean and M2 of each group
  float* scratch;       // two values a channel
  float* coefficients;  // three
  float* floats;        // a chunk, where it is not float32
  int64_t channels;

  Work(const Pixels& x, int64_t chunk, int64_t groups) : channels(x.channels) {
    const int64_t of_groups = 4 * groups;
    const int64_t values =
        x.dtype == ScalarType::Float ? 0 : std::min(chunk, x.pixels) * x.channels;
    float* memory = heatsink::thread_scratch(of_groups + 5 * channels + values);
    merged = reinterpret_cast<double*>(memory);
    scratch = memory + of_groups;
    coefficients = scratch + 2 * channels;
    floats = coefficients + 3 * channels;
  }

  Coefficients by() const {
    return {coefficients, coefficients + channels, coefficients + 2 * channels};
  }
};

class GroupNorm {
 public:
  GroupNorm(const Pixels& x, const Arguments& arguments, const Pixels& out)
      : x_(x),
        arguments_(arguments),
        out_(out),
        chunk_(std::max(kMinPixels, kChunk / x.channels)),
        chunks_((x.pixels + chunk_ - 1) / chunk_),
        tile_(std::max<int64_t>(1, kTile / x.channels)),
        moments_(reinterpret_cast<Moments*>(heatsink::thread_scratch(
            kFloats * x.samples * chunks_ * arguments.groups, heatsink::kShared))) {}

  void run() {
    const int64_t size = x_.pixels * x_.channels;
    if (x_.samples >= static_cast<int64_t>(torch::stable::get_num_threads()) || size <= kGrain) {
      // A sample is normalised by the thread that has it in its cache.
      const int64_t grain = std::max<int64_t>(1, kGrain / size);
      torch::stable::parallel_for(0, x_.samples, grain, [&](int64_t begin, int64_t end) {
        measure(begin * chunks_, end * chunks_, /*normalise_too=*/true);
      });
      return;
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / (chunk_ * x_.channels));
    const int64_t tasks = x_.samples * chunks_;
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      measure(begin, end, /*normalise_too=*/false);
    });
    torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      Work work(x_, chunk_, arguments_.groups);
      normalise(begin, end, work);
    });
  }

 private:
  static constexpr int64_t kFloats = sizeof(Moments) / sizeof(float);

  int64_t pixels_of(int64_t chunk) const { return std::min(chunk_, x_.pixels - chunk * chunk_); }

  // Pixels' values as float32, and the step between them.
  const float* read(int64_t n, int64_t first, int64_t pixels, Work& work, int64_t& step) const {
    const char* from = x_.at(n, first);
    if (x_.dtype == ScalarType::Float) {
      step = x_.pixel_step;
      return reinterpret_cast<const float*>(from);
    }
    step = x_.channels;
    if (x_.pixel_step == x_.channels) {
      read_floats(x_.dtype, from, pixels * step, work.floats);
    } else {
      for (int64_t p = 0; p < pixels; ++p) {
        read_floats(x_.dtype, x_.at(n, first + p), step, work.floats + p * step);
      }
    }
    return work.floats;
  }

  // Moments of tasks, which are chunks of samples in order.
  void measure(int64_t begin, int64_t end, bool normalise_too) {
    Work work(x_, chunk_, arguments_.groups);
    for (int64_t task = begin; task < end; ++task) {
      int64_t step = 0;
      const int64_t chunk = task % chunks_;
      const float* values = read(task / chunks_, chunk * chunk_, pixels_of(chunk), work, step);
      chunk_moments(values, step, pixels_of(chunk), x_.channels, arguments_.groups, work.scratch,
                    &moments_[task * arguments_.groups]);
      if (normalise_too && chunk == chunks_ - 1) {
        normalise(task - chunk, task + 1, work);
      }
    }
  }

  // The last chunk first: it is what was read last.
  void normalise(int64_t begin, int64_t end, Work& work) {
    int64_t known = -1;
    for (int64_t task = end - 1; task >= begin; --task) {
      const int64_t n = task / chunks_;
      const int64_t chunk = task % chunks_;
      if (n != known) {
        fill_coefficients(n, work);
        known = n;
      }
      const int64_t end_pixel = chunk * chunk_ + pixels_of(chunk);
      for (int64_t p = chunk * chunk_; p < end_pixel; p += tile_) {
        write(n, p, std::min(tile_, end_pixel - p), work);
      }
    }
  }

  void write(int64_t n, int64_t first, int64_t pixels, Work& work) const {
    int64_t step = 0;
    const float* values = read(n, first, pixels, work, step);
    const bool direct = x_.dtype == ScalarType::Float;
    float* results = direct ? reinterpret_cast<float*>(out_.at(n, first)) : work.floats;
    const auto apply = arguments_.silu ? apply_silu : apply_affine;
    apply(values, step, pixels, x_.channels, work.by(), results,
          direct ? out_.pixel_step : x_.channels);
    if (direct) {
      return;
    }
    if (out_.pixel_step == x_.channels) {
      write_floats(x_.dtype, results, pixels * x_.channels, out_.at(n, first));
      return;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      write_floats(x_.dtype, results + p * x_.channels, x_.channels, out_.at(n, first + p));
    }
  }

  // Chan's merging of the chunks' moments, in order and in double, and all that follows from it.
  void fill_coefficients(int64_t n, Work& work) const {
    const int64_t groups = arguments_.groups;
    double* mean = work.merged;
    double* m2 = mean + groups;
    std::fill_n(mean, 2 * groups, 0.0);
    double count = 0.0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const auto added = static_cast<double>(pixels_of(chunk) * (x_.channels / groups));
      merge(&moments_[(n * chunks_ + chunk) * groups], groups, count, added, mean, m2);
      count += added;
    }
    const Affine by{arguments_.weight.row(n), arguments_.bias.row(n), arguments_.scale.row(n),
                    arguments_.shift.row(n)};
    fold(mean, m2, groups, count, arguments_.eps, x_.channels, by, work.by());
  }

  const Pixels& x_;
  const Arguments& arguments_;
  const Pixels& out_;
  int64_t chunk_, chunks_, tile_;
  Moments* moments_;
};

// The step between pixels if they lie evenly with dense channels, else -1; 0 where they are one
// pixel in memory, as in an expanded view.
int64_t pixel_step(const Tensor& x) {
  if (x.size(1) > 1 && x.stride(1) != 1) {
    return -1;
  }
  int64_t step = -1;
  int64_t expected = 0;
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) == 1) {
      continue;
    }
    if (step < 0) {
      step = x.stride(d);
      expected = step;
    } else if (x.stride(d) != expected) {
      return -1;
    }
    expected *= x.size(d);
  }
  return step < 0 ? x.size(1) : step;
}

// Of x's shape and dtype, with channels innermost in memory.
Tensor empty_channels_last(const Tensor& x) {
  const int64_t dims = x.dim();
  std::vector<int64_t> sizes(static_cast<size_t>(dims)), strides(static_cast<size_t>(dims), 1);
  int64_t step = x.size(1);
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = x.size(d);
    if (d != 1) {
      strides[d] = step;
      step *= std::max<int64_t>(1, x.size(d));
    }
  }
  return empty_strided(x, sizes, strides);
}

// There is at least one value; `step` is as `pixel_step` gives it.
Pixels pixels_of(const Tensor& x, const void* data, int64_t sample_step, int64_t step) {
  const int64_t channels = x.size(1);
  return {static_cast<char*>(const_cast<void*>(data)),
          x.size(0),
          x.numel() / (x.size(0) * channels),
          channels,
          sample_step,
          step,
          x.scalar_type()};
}

// x, copied where it must be.
Pixels pixels_of(const Tensor& x) {
  const int64_t step = pixel_step(x);
  if (step >= 0) {
    return pixels_of(x, x.const_data_ptr(), x.stride(0), step);
  }
  return pixels_of(x, dense(x, shape_with_channels_last(x)), x.numel() / x.size(0), x.size(1));
}

Pixels pixels_of_out(Tensor& out) {
  const int64_t step = pixel_step(out);
  STD_TORCH_CHECK(step >= 0, "out: expected channels innermost in memory and pixels evenly apart");
  return pixels_of(out, out.mutable_data_ptr(), out.stride(0), step);
}

using Given = std::optional<Tensor>;

void check_dims(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 3, "x: expected (N, C, ...), got ", x.dim(), " dimensions");
}

// x: (N, C, ...) in any strides.
void normalise(const Tensor& x, int64_t groups, const Given& weight, const Given& bias, double eps,
               const Given& scale, const Given& shift, bool silu, Tensor& out) {
  check_float(x, "x");
  check_dims(x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups: expected a divisor of ", channels,
                  ", got ", groups);
  if (x.numel() == 0) {
    return;
  }
  const Pixels to = pixels_of_out(out);
  const Pixels from = pixels_of(x);
  const Arguments arguments{{weight, x, channels, 0},
                            {bias, x, channels, 1},
                            {scale, x, channels, 2},
                            {shift, x, channels, 3},
                            groups,
                            eps,
                            silu};
  GroupNorm(from, arguments, to).run();
}

// Returns the same shape with channels innermost in memory.
Tensor group_norm_silu(Tensor x, int64_t groups, Given weight, Given bias, double eps, Given scale,
                       Given shift, bool silu) {
  check_dims(x);
  Tensor out = empty_channels_last(x);
  normalise(x, groups, weight, bias, eps, scale, shift, silu, out);
  return out;
}

// `out`, with channels innermost in memory, may be x itself.
void group_norm_silu_out(Tensor x, int64_t groups, Given weight, Given bias, double eps,
                         Given scale, Given shift, bool silu, Tensor out) {
  check_out(out, x);
  check_in_place_or_apart(out, x, "x");
  check_apart(out, weight, "weight");
  check_apart(out, bias, "bias");
  check_apart(out, scale, "scale");
  check_apart(out, shift, "shift");
  normalise(x, groups, weight, bias, eps, scale, shift, silu, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_out", HEATSINK_RECORDABLE(group_norm_silu_out));
}
