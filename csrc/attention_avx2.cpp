// The attention kernel in AVX2 and FMA: a vector of 16 floats is two registers.

#include "attention.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#include "attention_kernel.h"
#include "lanes_avx2.h"

namespace heatsink {

void attention_avx2(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  run_tasks<Avx2>(a, begin, end, scratch);
}

}  // namespace heatsink

#endif
