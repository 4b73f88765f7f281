// Weights of products in the order in which kernels read them, the same for all instruction sets.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace heatsink {
namespace {

// The row of the weight that lane `lane` of a panel holds, or -1.
int64_t row_of(bool geglu, int64_t columns, int64_t panel, int64_t lane) {
  if (!geglu) {
    const int64_t row = panel * kPanel + lane;
    return row < columns ? row : -1;
  }
  const int64_t row = panel * kLanes + lane % kLanes;
  return row < columns / 2 ? row + lane / kLanes * (columns / 2) : -1;
}

// A row of `depth` elements, each to `to + offset(k)`.
void pack_float(const float* row, int64_t depth, int64_t width, float* to) {
  for (int64_t k = 0; k < depth; ++k) {
    to[k * width] = row == nullptr ? 0.0f : row[k];
  }
}

void pack_pairs(const uint16_t* row, int64_t depth, int64_t width, int64_t lane, uint16_t* to) {
  for (int64_t tile = 0; tile < depth; tile += kTile) {
    uint16_t* pair = to + tile * width + lane / kLanes * kTile * kLanes + lane % kLanes * 2;
    for (int64_t k = 0; k < kTile; k += 2, pair += 2 * kLanes) {
      for (int64_t odd = 0; odd < 2; ++odd) {
        const int64_t place = tile + k + odd;
        pair[odd] = row == nullptr || place >= depth ? uint16_t{0} : row[place];
      }
    }
  }
}

}  // namespace

void pack(bool bfloat16, bool geglu, int64_t columns, int64_t depth, const char* weight, char* to) {
  const int64_t bytes = bfloat16 ? 2 : 4;
  for (int64_t panel = 0; panel < ceil_div(columns, kPanel); ++panel) {
    const int64_t width = panel_width(geglu, columns, panel);
    char* start = to + panel * kPanel * packed_depth(bfloat16, depth) * bytes;
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t row = row_of(geglu, columns, panel, lane);
      const char* from = row < 0 ? nullptr : weight + row * depth * bytes;
      if (bfloat16) {
        pack_pairs(reinterpret_cast<const uint16_t*>(from), depth, width, lane,
                   reinterpret_cast<uint16_t*>(start));
      } else {
        pack_float(reinterpret_cast<const float*>(from), depth, width,
                   reinterpret_cast<float*>(start) + lane);
      }
    }
  }
}

}  // namespace heatsink
