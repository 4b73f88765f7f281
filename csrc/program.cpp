// heatsink::program_*: lists of recorded calls (csrc/recorder.h), replayed without Python.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "pages.h"
#include "recorder.h"

namespace heatsink {

Program*& recorded() {
  thread_local Program* program = nullptr;
  return program;
}

}  // namespace heatsink

namespace {

using heatsink::Call;
using heatsink::Program;

std::mutex guard;

std::map<int64_t, std::shared_ptr<Program>>& programs() {
  static std::map<int64_t, std::shared_ptr<Program>> all;
  return all;
}

std::shared_ptr<Program> find(int64_t program) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = programs().find(program);
  STD_TORCH_CHECK(found != programs().end(), "program: there is none of number ", program);
  return found->second;
}

// A new number with an empty list.
int64_t program_new() {
  static int64_t last = 0;
  const std::lock_guard<std::mutex> lock(guard);
  programs()[++last] = std::make_shared<Program>();
  return last;
}

// From now on this thread's calls are added, named `label`, and not made.
void program_record(int64_t program, std::string label) {
  STD_TORCH_CHECK(heatsink::recorded() == nullptr, "program: this thread records one already");
  const std::shared_ptr<Program> found = find(program);
  found->label = std::move(label);
  heatsink::recorded() = found.get();
}

// This thread's calls are made again. Returns how many the program holds.
int64_t program_close() {
  Program* program = heatsink::recorded();
  STD_TORCH_CHECK(program != nullptr, "program: this thread records none");
  heatsink::recorded() = nullptr;
  return static_cast<int64_t>(program->calls.size());
}

// Makes the calls first..last-1 in order; an error says which failed.
void program_replay(int64_t program, int64_t first, int64_t last) {
  const std::shared_ptr<Program> found = find(program);
  STD_TORCH_CHECK(0 <= first && first <= last && last <= static_cast<int64_t>(found->calls.size()),
                  "program: expected calls among ", found->calls.size(), ", got ", first, " to ",
                  last);
  for (int64_t i = first; i < last; ++i) {
    const Call& call = found->calls[i];
    try {
      call.run();
    } catch (const std::exception& error) {
      STD_TORCH_CHECK(false, call.label, ": ", error.what());
    }
  }
}

// Forgets a program and lets its tensors go, once no replay of it is under way.
void program_free(int64_t program) {
  std::shared_ptr<Program> found = find(program);
  const std::lock_guard<std::mutex> lock(guard);
  programs().erase(program);
}

// Of a dense tensor's memory, which holds nothing yet.
void program_memory(torch::stable::Tensor memory) {
  STD_TORCH_CHECK(memory.is_cpu() && memory.is_contiguous(),
                  "memory: expected a dense tensor on the CPU");
  heatsink::prefer_large_pages(memory.mutable_data_ptr(),
                               static_cast<int64_t>(memory.numel() * memory.element_size()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CompositeExplicitAutograd, m) {
  m.impl("program_new", TORCH_BOX(&program_new));
  m.impl("program_record", TORCH_BOX(&program_record));
  m.impl("program_close", TORCH_BOX(&program_close));
  m.impl("program_replay", TORCH_BOX(&program_replay));
  m.impl("program_memory", TORCH_BOX(&program_memory));
  m.impl("program_free", TORCH_BOX(&program_free));
}
