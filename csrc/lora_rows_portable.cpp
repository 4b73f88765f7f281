// The kernel of lora_rows in plain C++, for processors that have no kernel of their own.

#include "lanes_portable.h"
#include "lora_rows.h"
#include "lora_rows_kernel.h"

namespace heatsink {

void lora_rows_portable(const LoraRows& c, LoraStep step, int64_t begin, int64_t end,
                        float* scratch) {
  run_lora_rows<Portable>(c, step, begin, end, scratch);
}

}  // namespace heatsink
