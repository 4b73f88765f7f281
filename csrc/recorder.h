// Ops whose calls can be kept and made again: with the same tensors, past Python and the
// dispatcher.
//
// An op that writes into `out` is registered as HEATSINK_RECORDABLE(function) in the place of
// TORCH_BOX(&function). While a thread records, a call of it is not made but added to the thread's
// program, with its arguments unpacked: a replay costs what a C++ call of the function costs.

#pragma once

#include <torch/csrc/stable/library.h>

#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace heatsink {

struct Call {
  std::string label;
  std::function<void()> run;  // holds its arguments, tensors among them
};

struct Program {
  std::string label;  // of the calls that are recorded now
  std::vector<Call> calls;
};

// The program that this thread records; null when it does not.
Program*& recorded();

template <auto function>
struct Recordable;

template <typename... Arguments, void (*function)(Arguments...)>
struct Recordable<function> {
  using Unpacked = std::tuple<std::decay_t<Arguments>...>;

  template <std::size_t... place>
  static Unpacked unpack(StableIValue* stack, std::index_sequence<place...>) {
    return {torch::stable::detail::to<std::decay_t<Arguments>>(stack[place])...};
  }

  static void call(StableIValue* stack, uint64_t, uint64_t) {
    Unpacked arguments = unpack(stack, std::index_sequence_for<Arguments...>());
    if (Program* program = recorded()) {
      program->calls.push_back({program->label, [arguments = std::move(arguments)] {
                                  std::apply(function, arguments);
                                }});
      return;
    }
    std::apply(function, std::move(arguments));
  }
};

}  // namespace heatsink

#define HEATSINK_RECORDABLE(function) heatsink::Recordable<&function>::call
