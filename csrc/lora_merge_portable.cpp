// The merge of low-rank terms in plain C++, for processors that have no kernel of their own.

#include <cstdint>
#include <cstring>

#include "lanes_portable.h"
#include "lora_merge.h"
#include "lora_merge_kernel.h"

namespace heatsink {

void lora_merge_portable(const Merge& merge, int64_t begin, int64_t end, float* scratch) {
  run_merge<Portable>(merge, begin, end, scratch);
}

}  // namespace heatsink
