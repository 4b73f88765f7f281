// heatsink::silu_mul and heatsink::geglu on the CPU: one pass over rows, computed in float32 and
// rounded once, with the bits of the PyTorch implementations.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "elements.h"
#include "exp.h"
#include "float_tensor.h"
#include "gelu.h"

namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should have at least
constexpr int64_t kTile = 512;    // elements converted at a time

template <typename Element>
HEATSINK_INLINE void silu_row(const void* gate, const void* up, void* out, int64_t count) {
  const Element* __restrict g = static_cast<const Element*>(gate);
  const Element* __restrict u = static_cast<const Element*>(up);
  Element* __restrict o = static_cast<Element*>(out);
  for (int64_t i = 0; i < count; ++i) {
    const float x = read(g[i]);
    write(x / (1.0f + exp_ieee(-x)) * read(u[i]), o[i]);
  }
}

template <typename Element>
HEATSINK_INLINE void geglu_row(const void* hidden, const void* gate, void* out, int64_t count) {
  const Element* __restrict h = static_cast<const Element*>(hidden);
  const Element* __restrict g = static_cast<const Element*>(gate);
  Element* __restrict o = static_cast<Element*>(out);
  for (int64_t i = 0; i < count; ++i) {
    write(read(h[i]) * gelu_ieee(read(g[i])), o[i]);
  }
}

HEATSINK_CLONES void silu_bfloat16(const void* g, const void* u, void* o, int64_t n) {
  silu_row<Bfloat16>(g, u, o, n);
}
HEATSINK_CLONES void silu_float(const void* g, const void* u, void* o, int64_t n) {
  silu_row<float>(g, u, o, n);
}
HEATSINK_CLONES void geglu_bfloat16(const void* h, const void* g, void* o, int64_t n) {
  geglu_row<Bfloat16>(h, g, o, n);
}
HEATSINK_CLONES void geglu_float(const void* h, const void* g, void* o, int64_t n) {
  geglu_row<float>(h, g, o, n);
}

using Row = void (*)(const void*, const void*, void*, int64_t);

// Float16 has instructions of its own for conversions, a tile at a time.
template <Row single>
void half_row(const void* first, const void* second, void* out, int64_t count) {
  float a[kTile], b[kTile], o[kTile];
  for (int64_t i = 0; i < count; i += kTile) {
    const int64_t some = std::min(kTile, count - i);
    read_floats(ScalarType::Half, static_cast<const Half*>(first) + i, some, a);
    read_floats(ScalarType::Half, static_cast<const Half*>(second) + i, some, b);
    single(a, b, o, some);
    write_floats(ScalarType::Half, o, some, static_cast<Half*>(out) + i);
  }
}

// The implementation for a dtype, of three.
Row choose(ScalarType dtype, const char* name, Row half, Row bfloat16, Row single) {
  switch (dtype) {
    case ScalarType::Half:
      return half;
    case ScalarType::BFloat16:
      return bfloat16;
    case ScalarType::Float:
      return single;
    default:
      STD_TORCH_CHECK(false, name, ": expected float16, bfloat16 or float32");
  }
}

// (..., W) as rows of one stride, copied only where it must be.
struct Rows {
  Tensor tensor;
  int64_t stride;

  explicit Rows(const Tensor& x) : tensor(x), stride(x.size(x.dim() - 1)) {
    if (!regular(x)) {
      tensor = torch::stable::contiguous(x);
      stride = x.size(x.dim() - 1);
    }
  }

  const char* data() const { return static_cast<const char*>(tensor.const_data_ptr()); }

 private:
  // True, and the stride known, if the last dimension is dense and the others are one in effect.
  bool regular(const Tensor& x) {
    const int64_t last = x.dim() - 1;
    if (x.size(last) != 1 && x.stride(last) != 1) {
      return false;
    }
    int64_t expected = -1;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (x.size(d) == 1) {
        continue;
      }
      if (expected < 0) {
        stride = x.stride(d);
      } else if (x.stride(d) != expected) {
        return false;
      }
      expected = x.stride(d) * x.size(d);
    }
    return true;
  }
};

// Calls `row` for every row of `first` and `second` (bytes further on in `second`).
void each_row(Row row, const Rows& first, const Rows& second, int64_t offset, Tensor& out) {
  const int64_t width = out.size(out.dim() - 1);
  const int64_t rows = width == 0 ? 0 : out.numel() / width;
  const int64_t size = static_cast<int64_t>(out.element_size());
  const char* a = first.data();
  const char* b = second.data() + offset * size;
  char* o = static_cast<char*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      row(a + r * first.stride * size, b + r * second.stride * size, o + r * width * size, width);
    }
  });
}

Tensor silu_mul(Tensor gate, Tensor up) {
  STD_TORCH_CHECK(gate.dim() >= 1 && up.dim() == gate.dim() && up.numel() == gate.numel() &&
                      up.scalar_type() == gate.scalar_type(),
                  "up: expected shape and dtype like gate");
  const Row row =
      choose(gate.scalar_type(), "gate", half_row<silu_float>, silu_bfloat16, silu_float);
  Tensor out = empty_rows(gate, gate.size(gate.dim() - 1));
  each_row(row, Rows(gate), Rows(up), 0, out);
  return out;
}

// x: (..., 2 W), hidden then gate. Returns (..., W).
Tensor geglu(Tensor x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, "x: expected (..., 2 W)");
  const Row row = choose(x.scalar_type(), "x", half_row<geglu_float>, geglu_bfloat16, geglu_float);
  const int64_t width = x.size(x.dim() - 1) / 2;
  Tensor out = empty_rows(x, width);
  const Rows rows(x);
  each_row(row, rows, rows, width, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("geglu", TORCH_BOX(&geglu));
}
