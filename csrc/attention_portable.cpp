// The attention kernel in plain C++, for processors that have no kernel of their own.

#include "attention.h"
#include "attention_kernel.h"
#include "lanes_portable.h"

namespace heatsink {

void attention_portable(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  run_tasks<Portable>(a, begin, end, scratch);
}

}  // namespace heatsink
