// The attention kernel in AVX-512: a vector of 16 floats is one register.

#include "attention.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// GCC 12 takes the unused operand of its own unmasked intrinsics for a variable that was not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "attention_kernel.h"
#include "attention_pairs.h"
#include "flush.h"
#include "lanes_avx512.h"

namespace heatsink {

void attention_avx512(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  if (a.element == Element::BFloat16) {
    const FlushDenormals flush;
    run_pairs<VectorPairs<Avx512, 6>>(a, begin, end, scratch);
  } else {
    run_tasks<Avx512>(a, begin, end, scratch);
  }
}

}  // namespace heatsink

#endif
