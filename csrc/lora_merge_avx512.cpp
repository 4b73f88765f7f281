// The merge of low-rank terms in AVX-512.

#include "lora_merge.h"

#ifdef HEATSINK_X86_KERNELS

#include <cstdint>
#include <cstring>

// After the standard headers, whose inline functions must stay runnable everywhere.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// GCC 12 takes the unused operand of its own unmasked intrinsics for a variable that was not set.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#include "lanes_avx512.h"
#include "lora_merge_kernel.h"

namespace heatsink {

void lora_merge_avx512(const Merge& merge, int64_t begin, int64_t end, float* scratch) {
  run_merge<Avx512>(merge, begin, end, scratch);
}

}  // namespace heatsink

#endif
