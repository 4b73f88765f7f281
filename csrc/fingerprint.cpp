// heatsink::fingerprint on the CPU: the digest of docs/fingerprint.md, with the non-finite count
// and the absolute maximum, in one reading of the tensor.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <vector>

#include "fingerprint_tile.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 16;     // tiles a thread should have at least
constexpr int64_t kShortRun = 16;  // channels below which a transposing copy is cheaper

// How a row lies in memory: `groups` runs of `run` elements, one after the other; element j of run
// g has the logical index g * group_step + j * run_step.
struct Layout {
  int64_t groups, run, group_step, run_step;
};

// True when the row is dense with its first dimension innermost, as in channels_last.
bool channels_inside(const Tensor& x) {
  if (x.dim() < 3 || x.stride(1) != 1 || x.size(1) < kShortRun) {
    return false;
  }
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

bool row_contiguous(const Tensor& x) {
  int64_t expected = 1;
  for (int64_t d = x.dim() - 1; d >= 1; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

struct Totals {
  std::atomic<uint64_t> digest{0};
  std::atomic<uint64_t> nonfinite{0};
  std::atomic<uint64_t> magnitude{0};

  void merge(const Summary& part) {
    digest.fetch_add(part.digest, std::memory_order_relaxed);
    nonfinite.fetch_add(part.nonfinite, std::memory_order_relaxed);
    uint64_t seen = magnitude.load(std::memory_order_relaxed);
    while (seen < part.magnitude && !magnitude.compare_exchange_weak(seen, part.magnitude)) {
    }
  }
};

void read_tile(const Type& type, const char* data, int64_t count, const Keys& keys,
               Summary& summary) {
  if (type.read32 != nullptr) {
    alignas(64) uint32_t words[kTile];
    type.read32(data, count, words, summary);
    summary.digest += dot32(words, keys, count);
  } else {
    alignas(64) uint64_t words[kTile];
    type.read64(data, count, words, summary);
    summary.digest += dot64(words, keys, count);
  }
}

void read_rows(const Tensor& x, const Layout& layout, const Type& type,
               std::vector<Totals>& totals) {
  const int64_t rows = x.size(0);
  const int64_t size = static_cast<int64_t>(x.element_size());
  const char* data = static_cast<const char*>(x.const_data_ptr());
  const int64_t row_bytes = x.stride(0) * size;
  const int64_t tiles = (layout.run + kTile - 1) / kTile;
  const int64_t grain = kGrain * std::max<int64_t>(1, kTile / std::max<int64_t>(1, layout.run));
  torch::stable::parallel_for(0, layout.groups * tiles, grain, [&](int64_t begin, int64_t end) {
    Keys keys;
    std::vector<Summary> parts(static_cast<size_t>(rows));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / tiles;
      const int64_t start = task % tiles * kTile;
      const int64_t count = std::min(layout.run - start, kTile);
      const int64_t index = group * layout.group_step + start * layout.run_step;
      fill_keys(static_cast<uint32_t>(index), static_cast<uint32_t>(layout.run_step), count, keys);
      const char* tile = data + (group * layout.run + start) * size;
      for (int64_t row = 0; row < rows; ++row) {
        read_tile(type, tile + row * row_bytes, count, keys, parts[static_cast<size_t>(row)]);
      }
    }
    for (size_t row = 0; row < parts.size(); ++row) {
      totals[row].merge(parts[row]);
    }
  });
}

// x: (rows, ...), any strides. Returns digest int64, nonfinite int64, absmax float32, each (rows,).
std::tuple<Tensor, Tensor, Tensor> fingerprint(Tensor x) {
  STD_TORCH_CHECK(x.dim() >= 1, "x: expected at least one dimension, got none");
  const Type type = type_of(x.scalar_type());
  const int64_t rows = x.size(0);
  const int64_t count = rows == 0 ? 0 : x.numel() / rows;
  STD_TORCH_CHECK(count < (int64_t{1} << 31), "x: expected rows of fewer than 2^31 elements, got ",
                  count);
  Tensor digest = torch::stable::new_empty(x, {rows}, ScalarType::Long);
  Tensor nonfinite = torch::stable::new_empty(x, {rows}, ScalarType::Long);
  Tensor absmax = torch::stable::new_empty(x, {rows}, ScalarType::Float);

  std::vector<Totals> totals(static_cast<size_t>(rows));
  if (count > 0) {
    if (row_contiguous(x)) {
      read_rows(x, {1, count, 0, 1}, type, totals);
    } else if (channels_inside(x)) {
      const int64_t channels = x.size(1);
      const int64_t pixels = count / channels;
      read_rows(x, {pixels, channels, 1, pixels}, type, totals);
    } else {
      read_rows(torch::stable::contiguous(x), {1, count, 0, 1}, type, totals);
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Totals& total = totals[static_cast<size_t>(row)];
    static_cast<int64_t*>(digest.mutable_data_ptr())[row] =
        static_cast<int64_t>(total.digest.load());
    static_cast<int64_t*>(nonfinite.mutable_data_ptr())[row] =
        static_cast<int64_t>(total.nonfinite.load());
    static_cast<float*>(absmax.mutable_data_ptr())[row] = type.magnitude(total.magnitude.load());
  }
  return {digest, nonfinite, absmax};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }
