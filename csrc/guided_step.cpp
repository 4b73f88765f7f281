// heatsink::guided_step on the CPU: guidance and the scheduler's update of rows at steps of their
// own, with the noise of docs/noise.md. The order of every operation is part of the specification
// (docs/schedule.md).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "elements.h"
#include "float_tensor.h"
#include "given_out.h"
#include "noise.h"
#include "recorder.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 8;      // tiles a thread should have at least
constexpr int64_t kStepNoise = 1;  // the purpose STEP
constexpr int64_t kCoefficients = 8;

// The columns of a row's coefficients, as they lie in memory.
struct Coefficients {
  float timestep, s, p, q, a, b, c, d;
};
static_assert(sizeof(Coefficients) == kCoefficients * sizeof(float));

// u becomes u + scale * (c - u).
HEATSINK_CLONES void guide(const float* __restrict c, float scale, float* __restrict u,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    u[i] = u[i] + scale * (c[i] - u[i]);
  }
}

// `next` may be x itself.
HEATSINK_CLONES void advance(const Coefficients& k, const float* x, const float* __restrict out,
                             float* next, float* __restrict x0, int64_t count) {
  HEATSINK_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    x0[i] = k.p * x[i] + k.q * out[i];
    next[i] = k.a * x[i] + k.b * x0[i];
  }
}

HEATSINK_CLONES void add_scaled(const float* __restrict term, float scale, float* __restrict next,
                                int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    next[i] = next[i] + scale * term[i];
  }
}

template <typename Element>
HEATSINK_INLINE void load(const void* data, int64_t stride, int64_t count,
                          float* __restrict values) {
  const Element* elements = static_cast<const Element*>(data);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = read(elements[i * stride]);
  }
}

HEATSINK_CLONES void load_half(const void* data, int64_t stride, int64_t count, float* values) {
  load<Half>(data, stride, count, values);
}
HEATSINK_CLONES void load_bfloat16(const void* data, int64_t stride, int64_t count, float* values) {
  load<Bfloat16>(data, stride, count, values);
}
HEATSINK_CLONES void load_float(const void* data, int64_t stride, int64_t count, float* values) {
  load<float>(data, stride, count, values);
}

using Load = void (*)(const void*, int64_t, int64_t, float*);

Load loader(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return load_half;
    case ScalarType::BFloat16:
      return load_bfloat16;
    case ScalarType::Float:
      return load_float;
    default:
      STD_TORCH_CHECK(false, "out: expected float16, bfloat16 or float32");
  }
}

bool row_contiguous(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 1; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

// True when a row is dense with its first dimension innermost, as in channels_last.
bool channels_inside(const Tensor& x) {
  if (x.dim() < 3 || x.stride(1) != 1) {
    return false;
  }
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

// The network's output: element i of a row lies at (i mod pixels) * channels + i div pixels.
struct Output {
  Tensor tensor;
  int64_t channels = 1;
  int64_t pixels;
  Load load;

  Output(const Tensor& out, int64_t count)
      : tensor(out), pixels(count), load(loader(out.scalar_type())) {
    if (row_contiguous(out)) {
      return;
    }
    if (channels_inside(out)) {
      channels = out.size(1);
      pixels = count / channels;
    } else {
      tensor = torch::stable::contiguous(out);
    }
  }

  void tile(int64_t row, int64_t first, int64_t count, float* values) const {
    const int64_t size = static_cast<int64_t>(tensor.element_size());
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    for (int64_t done = 0; done < count;) {
      const int64_t channel = (first + done) / pixels;
      const int64_t pixel = (first + done) % pixels;
      const int64_t run = std::min(count - done, pixels - pixel);
      const int64_t place = row * tensor.stride(0) + pixel * channels + channel;
      load(data + place * size, channels, run, values + done);
      done += run;
    }
  }
};

template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

struct Step {
  Tensor x, x0_prev, coef, guidance, uncond, cond, seeds, steps;
  Output out;
  int64_t count;
  float* next;
  float* x0;

  void tile(int64_t row, int64_t tile) const {
    const int64_t first = tile * kNoiseTile;
    const int64_t kept = std::min(count - first, kNoiseTile);
    const int64_t place = row * count + first;
    const Coefficients& k = data_of<Coefficients>(coef)[row];
    const int32_t u = data_of<int32_t>(uncond)[row];
    const int32_t c = data_of<int32_t>(cond)[row];
    float first_out[kNoiseTile];
    float second_out[kNoiseTile];
    out.tile(u, first, kept, first_out);
    if (u != c) {
      out.tile(c, first, kept, second_out);
      guide(second_out, data_of<float>(guidance)[row], first_out, kept);
    }
    advance(k, data_of<float>(x) + place, first_out, next + place, x0 + place, kept);
    if (k.c != 0.0f) {
      add_scaled(data_of<float>(x0_prev) + place, k.c, next + place, kept);
    }
    if (k.d != 0.0f) {
      float noise[kNoiseTile];
      const Stream stream =
          stream_of(data_of<int64_t>(seeds)[row], data_of<int64_t>(steps)[row], kStepNoise);
      normal_tile(stream, tile, noise);
      add_scaled(noise, k.d, next + place, kept);
    }
  }
};

void check(const char* name, const Tensor& x, ScalarType dtype, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.numel() == numel && x.is_cpu(), name,
                  ": expected another dtype, number of elements or device");
}

void check_rows(const char* name, const Tensor& rows, int64_t end) {
  for (int64_t i = 0; i < rows.numel(); ++i) {
    const int32_t row = data_of<int32_t>(rows)[i];
    STD_TORCH_CHECK(0 <= row && row < end, name, ": expected rows of out, 0 to ", end - 1, ", got ",
                    row);
  }
}

// See kernels/guided_step.py. `next` and `x0` are contiguous; `next` may be x itself.
void step_rows(Tensor x, const Tensor& out, Tensor x0_prev, Tensor coef, Tensor guidance,
               Tensor uncond, Tensor cond, Tensor seeds, Tensor steps, Tensor& next, Tensor& x0) {
  const int64_t rows = x.size(0);
  const int64_t count = rows == 0 ? 0 : x.numel() / rows;
  check("x", x, ScalarType::Float, x.numel());
  check("x0_prev", x0_prev, ScalarType::Float, x.numel());
  check("coef", coef, ScalarType::Float, rows * kCoefficients);
  check("guidance", guidance, ScalarType::Float, rows);
  check("uncond", uncond, ScalarType::Int, rows);
  check("cond", cond, ScalarType::Int, rows);
  check("seeds", seeds, ScalarType::Long, rows);
  check("steps", steps, ScalarType::Long, rows);
  check("out", out, out.scalar_type(), out.size(0) * count);
  const auto dense = [](const Tensor& t) {
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  };
  uncond = dense(uncond);
  cond = dense(cond);
  check_rows("uncond", uncond, out.size(0));
  check_rows("cond", cond, out.size(0));

  if (count == 0) {
    return;
  }
  const Step step{dense(x),
                  dense(x0_prev),
                  dense(coef),
                  dense(guidance),
                  uncond,
                  cond,
                  dense(seeds),
                  dense(steps),
                  Output(out, count),
                  count,
                  static_cast<float*>(next.mutable_data_ptr()),
                  static_cast<float*>(x0.mutable_data_ptr())};
  const int64_t tiles = (count + kNoiseTile - 1) / kNoiseTile;
  torch::stable::parallel_for(0, rows * tiles, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      step.tile(task / tiles, task % tiles);
    }
  });
}

// Returns (x_next, x0), float32 like x, contiguous.
std::tuple<Tensor, Tensor> guided_step(Tensor x, Tensor out, Tensor x0_prev, Tensor coef,
                                       Tensor guidance, Tensor uncond, Tensor cond, Tensor seeds,
                                       Tensor steps) {
  check("x", x, ScalarType::Float, x.numel());
  Tensor next = empty_rows(x);
  Tensor x0 = empty_rows(x);
  step_rows(x, out, x0_prev, coef, guidance, uncond, cond, seeds, steps, next, x0);
  return {next, x0};
}

// Nothing is allocated where every argument is dense. `x_next` may be x itself.
void guided_step_out(Tensor x, Tensor out, Tensor x0_prev, Tensor coef, Tensor guidance,
                     Tensor uncond, Tensor cond, Tensor seeds, Tensor steps, Tensor x_next,
                     Tensor x0) {
  check_out(x_next, x, "x_next");
  check_out(x0, x, "x0");
  STD_TORCH_CHECK(x_next.is_contiguous() && x0.is_contiguous(),
                  "x_next, x0: expected contiguous memory");
  check_in_place_or_apart(x_next, x, "x", "x_next");
  check_apart(x0, x, "x", "x0");
  check_apart(x0, x_next, "x_next", "x0");
  const Tensor* const others[] = {&out, &x0_prev, &coef, &guidance, &uncond, &cond, &seeds, &steps};
  for (const Tensor* other : others) {
    check_apart(x_next, *other, "the arguments", "x_next");
    check_apart(x0, *other, "the arguments", "x0");
  }
  step_rows(x, out, x0_prev, coef, guidance, uncond, cond, seeds, steps, x_next, x0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("guided_step", TORCH_BOX(&guided_step));
  m.impl("guided_step_out", HEATSINK_RECORDABLE(guided_step_out));
}
