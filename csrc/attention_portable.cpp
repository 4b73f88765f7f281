// The attention kernel in plain C++, for processors that have no kernel of their own.

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "attention_kernel.h"
#include "attention_pairs.h"
#include "flush.h"
#include "lanes_portable.h"

namespace heatsink {

void attention_portable(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  if (a.element == Element::BFloat16) {
    const FlushDenormals flush;
    run_pairs<VectorPairs<Portable, 2>>(a, begin, end, scratch);
  } else {
    run_tasks<Portable>(a, begin, end, scratch);
  }
}

}  // namespace heatsink
