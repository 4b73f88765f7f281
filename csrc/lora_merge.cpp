// heatsink::lora_merge on the CPU: arguments, terms as the kernels read them, and the split among
// threads.

#include "lora_merge.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "float_tensor.h"
#include "instructions.h"
#include "scratch.h"

namespace {

using heatsink::Element;
using heatsink::kPanel;
using heatsink::Merge;
using heatsink::MergeKernel;
using heatsink::MergeTask;
using heatsink::MergeTerm;
using heatsink::MergeWeight;

constexpr int64_t kPlaces = 4;              // weight, row, step and magnitude of a term
constexpr int64_t kTaskElements = 1 << 17;  // of a weight that a task has at most
constexpr int64_t kTaskFloats = 1 << 16;  // of A that a task reads again and again: they stay in L2
// Where more is written, the results do not go to the caches, whose other contents stay.
constexpr int64_t kStreamBytes = 1 << 25;

// What a call is made of, one for each argument of the op.
struct Call {
  std::vector<Tensor> base, out, a, b, magnitudes;
  std::vector<double> scales;
  std::vector<int64_t> places;

  int64_t place(int64_t term, int64_t which) const { return places[term * kPlaces + which]; }
};

int64_t rows_of(const Tensor& x) { return x.dim() == 0 ? 1 : x.size(0); }

int64_t columns_of(const Tensor& x) { return rows_of(x) == 0 ? 0 : x.numel() / rows_of(x); }

// How the columns of a row lie in memory: as in the shape, or with the first dimension after the
// row innermost, as in channels_last.
struct Order {
  int64_t channels, pixels;
  bool dense, channels_last;

  explicit Order(const Tensor& x) : channels(1), pixels(1), dense(true), channels_last(true) {
    if (x.dim() > 1) {
      channels = x.size(1);
      pixels = channels == 0 ? 0 : columns_of(x) / channels;
    }
    int64_t step = 1, last_step = channels;
    for (int64_t d = x.dim() - 1; d >= 0; --d) {
      const bool counts = x.size(d) != 1;
      dense = dense && (!counts || x.stride(d) == step);
      const int64_t wanted = d == 0 ? columns_of(x) : d == 1 ? 1 : last_step;
      channels_last = channels_last && (!counts || x.stride(d) == wanted);
      step *= x.size(d);
      last_step *= d > 1 ? x.size(d) : 1;
    }
    dense = dense || x.numel() == 0;
    channels_last = channels_last && x.dim() > 2 && !dense;
  }
};

using Floats = std::unique_ptr<float[], decltype(&std::free)>;

// At a multiple of 64 bytes: a vector in two cache lines takes twice as long to read.
Floats allocate(int64_t count) {
  const auto bytes = static_cast<size_t>(heatsink::round_up(std::max<int64_t>(count, 1), 16) * 4);
  auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
  STD_TORCH_CHECK(memory != nullptr, "no memory for ", count, " floats of an adapter");
  return {memory, std::free};
}

// A term's matrices as the kernels read them.
struct Prepared {
  Floats a{nullptr, std::free}, b{nullptr, std::free}, magnitude{nullptr, std::free};
};

// A contiguous tensor in float32.
Floats floats(const Tensor& x) {
  Floats out = allocate(x.numel());
  read_floats(x.scalar_type(), x.const_data_ptr(), x.numel(), out.get());
  return out;
}

// A in panels, its columns in the order of the weight's memory.
Floats panels_of(const Tensor& a, const Order& weight) {
  const Floats values = floats(a);
  const int64_t rank = rows_of(a), columns = columns_of(a);
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  Floats out = allocate(panels * rank * kPanel);
  std::fill_n(out.get(), panels * rank * kPanel, 0.0f);
  for (int64_t k = 0; k < rank; ++k) {
    const float* from = values.get() + k * columns;
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* to = out.get() + (panel * rank + k) * kPanel;
      const int64_t first = panel * kPanel, count = std::min(kPanel, columns - first);
      if (!weight.channels_last) {
        std::copy_n(from + first, count, to);
        continue;
      }
      for (int64_t j = 0; j < count; ++j) {
        const int64_t n = first + j;
        to[j] = from[n % weight.channels * weight.pixels + n / weight.channels];
      }
    }
  }
  return out;
}

void check_call(const Call& call) {
  STD_TORCH_CHECK(call.base.size() == call.out.size(), "out: expected as many weights as base");
  const size_t terms = call.a.size();
  STD_TORCH_CHECK(call.b.size() == terms && call.scales.size() == terms &&
                      call.places.size() == terms * kPlaces,
                  "terms: expected a, b, scale and four places of each");
  for (size_t j = 0; j < call.base.size(); ++j) {
    const Tensor &base = call.base[j], &out = call.out[j];
    check_float(base, "base");
    STD_TORCH_CHECK(base.is_cpu() && out.is_cpu() && out.numel() == base.numel() &&
                        out.scalar_type() == base.scalar_type() &&
                        base.scalar_type() == call.base[0].scalar_type(),
                    "out: expected weights like base, of one dtype");
    const Order order(base), written(out);
    STD_TORCH_CHECK(order.dense ? written.dense : order.channels_last && written.channels_last,
                    "base, out: expected dense weights of one layout");
  }
}

void check_term(const Call& call, int64_t t) {
  const Tensor &a = call.a[t], &b = call.b[t];
  const int64_t weight = call.place(t, 0), row = call.place(t, 1), step = call.place(t, 2);
  const int64_t magnitude = call.place(t, 3);
  check_float(a, "a");
  check_float(b, "b");
  STD_TORCH_CHECK(0 <= weight && weight < static_cast<int64_t>(call.base.size()) &&
                      magnitude < static_cast<int64_t>(call.magnitudes.size()),
                  "places: expected a weight and a magnitude of this call");
  const Tensor& base = call.base[weight];
  STD_TORCH_CHECK(b.dim() == 2 && a.dim() >= 1 && a.size(0) == b.size(1) && a.is_cpu() &&
                      b.is_cpu() && (a.size(0) == 0 || columns_of(a) == columns_of(base)),
                  "a, b: expected (rank, ...) and (rows, rank) for their weight");
  STD_TORCH_CHECK(
      row >= 0 && step >= 1 && (b.size(0) == 0 || row + (b.size(0) - 1) * step < rows_of(base)),
      "row, step: expected rows of the weight");
  STD_TORCH_CHECK(magnitude < 0 || call.magnitudes[magnitude].numel() == b.size(0),
                  "magnitude: expected a value for each row of b");
}

// Terms in the weights' order, those of one weight in their own.
std::vector<int64_t> sorted_terms(const Call& call) {
  std::vector<int64_t> order;
  for (size_t t = 0; t < call.a.size(); ++t) {
    check_term(call, static_cast<int64_t>(t));
    if (call.b[t].size(0) > 0) {
      order.push_back(static_cast<int64_t>(t));
    }
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t s, int64_t t) { return call.place(s, 0) < call.place(t, 0); });
  return order;
}

MergeTerm prepare(const Call& call, int64_t t, Prepared& memory) {
  const Tensor& b = call.b[t];
  memory.a = panels_of(call.a[t], Order(call.base[call.place(t, 0)]));
  memory.b = floats(b);
  const auto scale = static_cast<float>(call.scales[t]);
  for (int64_t i = 0; i < b.numel(); ++i) {
    memory.b[i] *= scale;
  }
  if (call.place(t, 3) >= 0) {
    const Tensor& magnitude = call.magnitudes[call.place(t, 3)];
    check_float(magnitude, "magnitude");
    memory.magnitude = floats(magnitude);
  }
  return {memory.a.get(),   memory.b.get(), memory.magnitude.get(), b.size(1), call.place(t, 1),
          call.place(t, 2), b.size(0)};
}

// Cuts a weight into tasks; where rows have gains, a task has whole rows.
void add_tasks(const MergeWeight& weight, int64_t j, std::vector<MergeTask>& tasks) {
  int64_t width = weight.columns;
  if (weight.ranks > 0 && !weight.magnitude) {
    const int64_t fits = std::max<int64_t>(8 * kPanel, kTaskFloats / weight.ranks);
    width = std::min(width, heatsink::round_up(fits, kPanel));
  }
  const int64_t most = std::max<int64_t>(1, kTaskElements / width);
  const int64_t rows = heatsink::round_up(most, heatsink::kMostRows);
  for (int64_t column = 0; column < weight.columns; column += width) {
    for (int64_t row = 0; row < weight.rows; row += rows) {
      tasks.push_back({j, row, std::min(weight.rows, row + rows), column,
                       std::min(weight.columns, column + width)});
    }
  }
}

Element element_of(ScalarType dtype) {
  return dtype == ScalarType::Float  ? Element::Float
         : dtype == ScalarType::Half ? Element::Half
                                     : Element::BFloat16;
}

bool at_line(const void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; }

// The call's weights, terms and tasks as the kernels read them.
class Merging {
 public:
  explicit Merging(const Call& call) : order_(sorted_terms(call)) {
    memory_.resize(order_.size());
    terms_.resize(order_.size());
    const auto count = static_cast<int64_t>(order_.size());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        terms_[t] = prepare(call, order_[t], memory_[t]);
      }
    });
    const int64_t bytes = element_bytes(call.base[0].scalar_type());
    int64_t total = 0;
    for (const Tensor& weight : call.base) {
      total += weight.numel() * bytes;
    }
    for (size_t j = 0; j < call.base.size(); ++j) {
      add_weight(call, static_cast<int64_t>(j), bytes, total > kStreamBytes);
    }
  }

  void run(Element element) const {
    static const MergeKernel kernel = HEATSINK_CHOOSE(lora_merge);
    const Merge merge{weights_.data(), terms_.data(), tasks_.data(), element};
    const auto count = static_cast<int64_t>(tasks_.size());
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      kernel(merge, begin, end, heatsink::thread_scratch(floats_));
    });
  }

 private:
  void add_weight(const Call& call, int64_t j, int64_t bytes, bool large) {
    MergeWeight weight{};
    weight.base = static_cast<const char*>(call.base[j].const_data_ptr());
    weight.out = static_cast<char*>(call.out[j].mutable_data_ptr());
    weight.rows = rows_of(call.base[j]);
    weight.columns = columns_of(call.base[j]);
    weight.first_term = weights_.empty() ? 0 : weights_.back().last_term;
    weight.last_term = weight.first_term;
    while (weight.last_term < static_cast<int64_t>(order_.size()) &&
           call.place(order_[weight.last_term], 0) == j) {
      const MergeTerm& term = terms_[weight.last_term++];
      weight.ranks += term.rank;
      weight.magnitude |= term.magnitude != nullptr;
    }
    weight.stream = large && at_line(weight.out) && weight.columns * bytes % 64 == 0;
    floats_ = std::max(floats_, heatsink::scratch_floats(weight));
    if (weight.rows * weight.columns > 0 && weight.base != weight.out) {
      add_tasks(weight, j, tasks_);
    }
    weights_.push_back(weight);
  }

  std::vector<int64_t> order_;
  std::vector<Prepared> memory_;
  std::vector<MergeTerm> terms_;
  std::vector<MergeWeight> weights_;
  std::vector<MergeTask> tasks_;
  int64_t floats_ = 0;
};

// See kernels/lora_merge.py: writes every out[j].
void lora_merge(std::vector<Tensor> base, std::vector<Tensor> out, std::vector<Tensor> a,
                std::vector<Tensor> b, std::vector<Tensor> magnitudes, std::vector<double> scales,
                std::vector<int64_t> places) {
  if (base.empty()) {
    return;
  }
  for (std::vector<Tensor>* matrices : {&a, &b, &magnitudes}) {
    for (Tensor& matrix : *matrices) {
      matrix = torch::stable::contiguous(matrix);
    }
  }
  const Call call{base, out, a, b, magnitudes, scales, places};
  check_call(call);
  Merging(call).run(element_of(base[0].scalar_type()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("lora_merge", TORCH_BOX(&lora_merge)); }
