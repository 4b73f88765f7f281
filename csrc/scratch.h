// Memory for intermediate values.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace heatsink {

// What a thread's memory is for. Each use has its own, so that one call may have several.
enum Scratch : int {
  kWork,        // a task's intermediate values, on the thread that runs it
  kShared,      // what the tasks of a call share, on the thread that called
  kDense,       // a copy of an operand whose strides no kernel reads
  kDenseOther,  // of another
  kBank,        // adapters of a bank in float32
  kImages,      // an image of every row, with its edges
  kTerms,       // what is added to a block of tokens
  kParameters,  // up to four parameters as float32
  kScratches = kParameters + 4,
};

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

// Memory that a thread keeps from call to call, aligned to 64 bytes: new pages, and what malloc
// does for blocks that are not small, cost more than a small call. The next call for the same use
// may give the same.
inline float* thread_scratch(int64_t floats, int use = kWork) {
  thread_local std::unique_ptr<float, Free> memories[kScratches];
  thread_local int64_t sizes[kScratches] = {};
  auto& memory = memories[use];
  int64_t& size = sizes[use];
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
