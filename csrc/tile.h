// How products are cut, whatever computes them.
#pragma once

#include <cstdint>

namespace heatsink {

constexpr int64_t kPanel = 32;  // columns that products work on side by side
// Products of bfloat16 are summed as AMX defines it, so many at a time: those of even and of odd
// places apart, each from 0, and their sum is added to what came before, denormal numbers flushed
// to 0 throughout. Other instruction sets do the same.
constexpr int64_t kTile = 32;

}  // namespace heatsink
