// What the vector types have in common: their width, and the dtypes that they read and write.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HEATSINK_X86_KERNELS
#endif

namespace heatsink {

enum class Element { Float, Half, BFloat16 };

constexpr int64_t kLanes = 16;  // floats of a vector, whatever the registers' width

constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace heatsink
