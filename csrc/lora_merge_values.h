// Values of a weight, read as vectors of float32 and rounded back once; included as
// csrc/lora_merge_kernel.h is.

#pragma once

#include "interface.h"
#include "lanes.h"

namespace heatsink {
namespace {

template <typename I, Element kElement>
struct Values;

template <typename I>
struct Values<I, Element::Float> {
  static constexpr int64_t kBytes = 4;
  static typename I::V load(const char* p) { return I::load(reinterpret_cast<const float*>(p)); }
  static void store(char* p, typename I::V a) { I::store(reinterpret_cast<float*>(p), a); }
};

template <typename I>
struct Values<I, Element::Half> {
  static constexpr int64_t kBytes = 2;
  static typename I::V load(const char* p) { return I::widen_half(p); }
  static void store(char* p, typename I::V a) { I::narrow_half(a, p); }
};

template <typename I>
struct Values<I, Element::BFloat16> {
  static constexpr int64_t kBytes = 2;
  static typename I::V load(const char* p) { return I::widen_bfloat16(p); }
  static void store(char* p, typename I::V a) { I::narrow_bfloat16(a, p); }
};

HEATSINK_INLINE int64_t clamped(int64_t count) {
  return count < 0 ? 0 : count > kLanes ? kLanes : count;
}

// Up to 16 values, the rest 0; no load reaches past a row's end.
template <typename I, typename E>
HEATSINK_INLINE typename I::V load_part(const char* from, int64_t count) {
  if (count == kLanes) {
    return E::load(from);
  }
  alignas(64) char few[kLanes * 4] = {};
  __builtin_memcpy(few, from, static_cast<uint64_t>(count * E::kBytes));
  return E::load(few);
}

template <typename I, typename E>
HEATSINK_INLINE void store_part(char* to, int64_t count, typename I::V value) {
  alignas(64) char few[kLanes * 4];
  E::store(few, value);
  __builtin_memcpy(to, few, static_cast<uint64_t>(count * E::kBytes));
}

}  // namespace
}  // namespace heatsink
