// Blocks of products of bfloat16 in AMX: tiles of 16 rows by 16 columns, 32 products deep.
//
// Included where the instruction set was raised, after <immintrin.h>; no standard header here.
#pragma once

#include "interface.h"
#include "lanes.h"
#include "tile.h"

namespace heatsink {
namespace {

// What was written is in memory: GCC does not know that the instructions below read it.
HEATSINK_INLINE void settle() { __asm__ volatile("" ::: "memory"); }

// All eight tiles of 16 rows of 64 bytes, for as long as it lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
      config[16 + 2 * tile] = 64;
      config[48 + tile] = 16;
    }
    // The compiler takes it for a pointer's size of memory, and drops the rest.
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// c (16 R rows by 16 V columns, rows kPanel apart) = or += a b. With `kStream` b is read past the
// nearest caches. Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of W.
template <int R, int V, bool kStream, typename Beside>
HEATSINK_INLINE void tiles(const char* a, int64_t pitch, const char* b, int64_t depth, float* c,
                           bool first, Beside& aside) {
  settle();
  constexpr int64_t kStep = kPanel * 4;
  float* below = c + kLanes * kPanel;
  if (first) {
    _tile_zero(0);
    if constexpr (V == 2) {
      _tile_zero(1);
    }
    if constexpr (R == 2) {
      _tile_zero(2);
    }
    if constexpr (R == 2 && V == 2) {
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, c, kStep);
    if constexpr (V == 2) {
      _tile_loadd(1, c + kLanes, kStep);
    }
    if constexpr (R == 2) {
      _tile_loadd(2, below, kStep);
    }
    if constexpr (R == 2 && V == 2) {
      _tile_loadd(3, below + kLanes, kStep);
    }
  }
  const char* under = a + kLanes * pitch;
  for (int64_t k = 0; k < depth; k += kTile, a += 2 * kTile, under += 2 * kTile, b += V * 1024) {
    if constexpr (kStream) {
      _tile_stream_loadd(6, b, 64);
    } else {
      _tile_loadd(6, b, 64);
    }
    _tile_loadd(4, a, pitch);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      if constexpr (kStream) {
        _tile_stream_loadd(7, b + 1024, 64);
      } else {
        _tile_loadd(7, b + 1024, 64);
      }
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R == 2) {
      _tile_loadd(5, under, pitch);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R == 2 && V == 2) {
      _tile_dpbf16ps(3, 5, 7);
    }
    aside.finish_some();
    aside.fetch_some();
  }
  _tile_stored(0, c, kStep);
  if constexpr (V == 2) {
    _tile_stored(1, c + kLanes, kStep);
  }
  if constexpr (R == 2) {
    _tile_stored(2, below, kStep);
  }
  if constexpr (R == 2 && V == 2) {
    _tile_stored(3, below + kLanes, kStep);
  }
}

}  // namespace
}  // namespace heatsink
