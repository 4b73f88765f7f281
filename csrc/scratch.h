// Memory for intermediate values.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace heatsink {

// Memory that a thread keeps from call to call, aligned to 64 bytes: new pages, and what malloc
// does for blocks that are not small, cost more than a small call. The next call for the same use
// may give the same.
template <int Use = 0>
float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float, decltype(&std::free)> memory(nullptr, std::free);
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = (floats + 15) / 16 * 16;
    memory.reset(
        static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(size) * sizeof(float))));
    if (memory == nullptr) {
      size = 0;
    }
    STD_TORCH_CHECK(memory != nullptr, "no memory for ", floats, " floats of scratch");
  }
  return memory.get();
}

}  // namespace heatsink
