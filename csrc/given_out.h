// What an op may be given as memory for its result: `out` of `heatsink::<op>_out`.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "float_tensor.h"

namespace {

// Elements from the first that a tensor touches to the last; it has some.
inline int64_t extent(const Tensor& x) {
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) {
    last += (x.size(d) - 1) * x.stride(d);
  }
  return last + 1;
}

// Whether the bytes from first to last of both have some in common.
inline bool meets(const Tensor& x, const Tensor& y) {
  if (x.numel() == 0 || y.numel() == 0) {
    return false;
  }
  const auto* a = static_cast<const char*>(x.const_data_ptr());
  const auto* b = static_cast<const char*>(y.const_data_ptr());
  return a < b + extent(y) * static_cast<int64_t>(y.element_size()) &&
         b < a + extent(x) * static_cast<int64_t>(x.element_size());
}

// Whether every element of `out` lies where the one of `x` at the same place does.
inline bool same_place(const Tensor& out, const Tensor& x) {
  if (out.const_data_ptr() != x.const_data_ptr() || out.element_size() != x.element_size() ||
      out.dim() != x.dim()) {
    return false;
  }
  for (int64_t d = 0; d < out.dim(); ++d) {
    if (out.size(d) > 1 && out.stride(d) != x.stride(d)) {
      return false;
    }
  }
  return true;
}

// Whether no two elements lie at one place: every step passes over all that smaller steps reach.
inline bool apart(const Tensor& x) {
  for (int64_t d = 0; d < x.dim(); ++d) {
    int64_t reach = 1;
    for (int64_t e = 0; e < x.dim(); ++e) {
      if (e != d && x.size(e) > 1 && x.stride(e) <= x.stride(d)) {
        reach += (x.size(e) - 1) * x.stride(e);
      }
    }
    if (x.size(d) > 1 && x.stride(d) < reach) {
      return false;
    }
  }
  return true;
}

// Raises unless `out` is memory for a result of x's dtype and shape, its last dimension divided.
// Here and below, `name` is the argument that is given memory.
inline void check_out(const Tensor& out, const Tensor& x, const char* name = "out",
                      int64_t divisor = 1) {
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == x.scalar_type() && out.dim() == x.dim(),
                  name, ": expected the result's dtype, device and number of dimensions");
  for (int64_t d = 0; d < x.dim(); ++d) {
    const int64_t expected = d == x.dim() - 1 ? x.size(d) / divisor : x.size(d);
    STD_TORCH_CHECK(out.size(d) == expected, name, ": expected size ", expected, " in dimension ",
                    d, ", got ", out.size(d));
  }
  STD_TORCH_CHECK(out.numel() == 0 || apart(out), name, ": expected no two elements at one place");
}

inline void check_apart(const Tensor& out, const Tensor& x, const char* other,
                        const char* name = "out") {
  STD_TORCH_CHECK(!meets(out, x), name, ": expected memory apart from that of ", other);
}

inline void check_apart(const Tensor& out, const std::optional<Tensor>& x, const char* other) {
  if (x.has_value()) {
    check_apart(out, *x, other);
  }
}

// For an op that reads each element of x before it writes the one at its place, and not after.
inline void check_in_place_or_apart(const Tensor& out, const Tensor& x, const char* other,
                                    const char* name = "out") {
  STD_TORCH_CHECK(same_place(out, x) || !meets(out, x), name,
                  ": expected memory apart from that of ", other, ", or exactly its own");
}

}  // namespace
