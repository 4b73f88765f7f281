// The product's kernel for bfloat16 in AMX: tiles of 16 rows by 16 columns, 32 products deep.

#include "product.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#pragma GCC target("prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "flush.h"
#include "product_kernel.h"

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

// Tiles 0 to 3 are sums, 4 and 5 rows of A, 6 and 7 columns of W.
template <int R, int V, typename Beside>
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
    _tile_stream_loadd(6, b, 64);
    _tile_loadd(4, a, pitch);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (V == 2) {
      _tile_stream_loadd(7, b + 1024, 64);
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

struct Amx {
  static constexpr bool kBfloat16 = true;
  static constexpr bool kPrefetches = true;
  static constexpr int64_t kRows = 2 * kLanes;
  static constexpr int64_t kGranule = kLanes;

  static int64_t steps(int64_t depth) { return depth / kTile; }
  // What is done aside comes between the products, which leave the vector units idle.
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Aside<Amx>& aside) {
    if (rows > kLanes) {
      if (width == kPanel) {
        tiles<2, 2>(a, pitch, b, depth, c, first, aside);
      } else {
        tiles<2, 1>(a, pitch, b, depth, c, first, aside);
      }
    } else if (width == kPanel) {
      tiles<1, 2>(a, pitch, b, depth, c, first, aside);
    } else {
      tiles<1, 1>(a, pitch, b, depth, c, first, aside);
    }
    aside.finish();
  }
  static void narrow(const Vector& x, char* to) {
    const __m256bh halves = _mm512_cvtneps_pbh(x);
    std::memcpy(to, &halves, sizeof halves);
  }
};

}  // namespace

void product_amx(const Product& p, int64_t task, char* scratch) {
  const FlushDenormals flush;
  const Tiles tiles;
  run_task<Amx>(p, task, scratch);
}

}  // namespace heatsink

#endif
