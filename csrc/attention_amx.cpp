// The attention kernel for bfloat16 in AMX, with AVX-512 beside it.

#include "attention.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#pragma GCC target("prefer-vector-width=512")
// GCC 12 takes the unused operand of its own unmasked intrinsics for a variable that was not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "lanes_avx512.h"
// After the lanes.
#include "amx_tiles.h"
#include "attention_pairs.h"
#include "flush.h"

namespace heatsink {
namespace {

struct AmxPairs : Avx512 {
  template <typename Beside>
  static void multiply(int64_t rows, const char* a, int64_t pitch, const char* b, int64_t width,
                       int64_t depth, float* c, bool first, Beside& aside) {
    for (; rows > 0; rows -= 2 * kLanes, a += 2 * kLanes * pitch, c += 2 * kLanes * kPanel) {
      if (rows > kLanes) {
        if (width == kPanel) {
          tiles<2, 2, false>(a, pitch, b, depth, c, first, aside);
        } else {
          tiles<2, 1, false>(a, pitch, b, depth, c, first, aside);
        }
      } else if (width == kPanel) {
        tiles<1, 2, false>(a, pitch, b, depth, c, first, aside);
      } else {
        tiles<1, 1, false>(a, pitch, b, depth, c, first, aside);
      }
    }
  }
};

}  // namespace

void attention_amx(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  if (a.element != Element::BFloat16) {
    attention_avx512(a, begin, end, scratch);
    return;
  }
  const FlushDenormals flush;
  const Tiles tiles;
  run_pairs<AmxPairs>(a, begin, end, scratch);
}

}  // namespace heatsink

#endif
