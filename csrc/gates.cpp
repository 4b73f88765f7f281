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
#include "given_out.h"
#include "recorder.h"
#include "rows.h"

namespace {

constexpr int64_t kGrain = 8192;  // elements a thread should have at least
constexpr int64_t kTile = 512;    // elements converted at a time

template <typename Element>
HEATSINK_INLINE void silu_row(const void* gate, const void* up, void* out, int64_t count) {
  const Element* g = static_cast<const Element*>(gate);
  const Element* u = static_cast<const Element*>(up);
  Element* o = static_cast<Element*>(out);
  HEATSINK_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const float x = read(g[i]);
    write(x / (1.0f + exp_ieee(-x)) * read(u[i]), o[i]);
  }
}

template <typename Element>
HEATSINK_INLINE void geglu_row(const void* hidden, const void* gate, void* out, int64_t count) {
  const Element* h = static_cast<const Element*>(hidden);
  const Element* g = static_cast<const Element*>(gate);
  Element* o = static_cast<Element*>(out);
  HEATSINK_INDEPENDENT
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

// Calls `row` for every row of `first` and `second`, `offset` bytes further on in the latter.
void each_row(Row row, const Rows& first, const Rows& second, int64_t offset, const Rows& out) {
  const int64_t grain = std::max<int64_t>(1, kGrain / out.width);
  torch::stable::parallel_for(0, out.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      row(first.row(r), second.row(r) + offset, out.row(r), out.width);
    }
  });
}

void gate_with_silu(const Tensor& gate, const Tensor& up, Tensor& out) {
  const Row row =
      choose(gate.scalar_type(), "gate", half_row<silu_float>, silu_bfloat16, silu_float);
  STD_TORCH_CHECK(gate.dim() >= 1 && up.dim() == gate.dim() && up.numel() == gate.numel() &&
                      up.scalar_type() == gate.scalar_type(),
                  "up: expected shape and dtype like gate");
  if (out.numel() == 0) {
    return;
  }
  const Rows to = rows_of_out(out);
  each_row(row, rows_of(gate), rows_of(up, heatsink::kDenseOther), 0, to);
}

Tensor silu_mul(Tensor gate, Tensor up) {
  Tensor out = empty_rows(gate);
  gate_with_silu(gate, up, out);
  return out;
}

// `out` may be gate or up itself.
void silu_mul_out(Tensor gate, Tensor up, Tensor out) {
  check_out(out, gate);
  check_in_place_or_apart(out, gate, "gate");
  check_in_place_or_apart(out, up, "up");
  gate_with_silu(gate, up, out);
}

// x: (..., 2 W), hidden then gate; out: (..., W).
void gate_with_gelu(const Tensor& x, Tensor& out) {
  const Row row = choose(x.scalar_type(), "x", half_row<geglu_float>, geglu_bfloat16, geglu_float);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, "x: expected (..., 2 W)");
  const int64_t width = x.size(x.dim() - 1) / 2;
  if (out.numel() == 0) {
    return;
  }
  const Rows to = rows_of_out(out);
  const Rows rows = rows_of(x);
  each_row(row, rows, rows, width * element_bytes(x.scalar_type()), to);
}

Tensor geglu(Tensor x) {
  Tensor out = empty_rows(x, x.dim() == 0 ? 1 : x.size(x.dim() - 1) / 2);
  gate_with_gelu(x, out);
  return out;
}

// `out` may be where hidden is.
void geglu_out(Tensor x, Tensor out) {
  check_out(out, x, "out", 2);
  check_in_place_or_apart(out, x, "x");
  gate_with_gelu(x, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul_out", HEATSINK_RECORDABLE(silu_mul_out));
  m.impl("geglu", TORCH_BOX(&geglu));
  m.impl("geglu_out", HEATSINK_RECORDABLE(geglu_out));
}
