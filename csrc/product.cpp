// What the ops that are products share, and the choice of their kernel.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "float_tensor.h"
#include "pages.h"
#include "processor.h"
#include "product_run.h"
#include "scratch.h"

namespace heatsink {
namespace {

// Products that are worth a thread, and bytes of weights.
constexpr int64_t kGrainFloat = 1 << 19;
constexpr int64_t kGrainBfloat16 = 1 << 21;
constexpr int64_t kGrainWeight = 1 << 19;
constexpr int64_t kFloatRows = 224;  // rows that a task has at most in float32

std::vector<Choice<ProductKernel>> kernels(bool bfloat16) {
  std::vector<Choice<ProductKernel>> found;
#ifdef HEATSINK_X86_KERNELS
  if (has_amx()) {
    found.push_back({"amx", bfloat16 ? product_amx : product_avx512});
  }
  if (has_avx512()) {
    found.push_back({"avx512", product_avx512});
  }
  if (has_avx2()) {
    found.push_back({"avx2", product_avx2});
  }
#endif
  found.push_back({"portable", product_portable});
  return found;
}

const Choice<ProductKernel>& kernel_for(bool bfloat16) {
  static const Choice<ProductKernel> choices[2] = {choose(kernels(false)), choose(kernels(true))};
  return choices[bfloat16 ? 1 : 0];
}

// The depth of bfloat16 that is worked on at a time. For images as wide as a block of rows, if
// possible channels of one pixel or of all that the kernel sees side by side: most blocks then need
// no copy. No bits depend on it.
int64_t choose_depth(const Product& p, int64_t depth) {
  const int64_t first = p.images[0].channels, second = p.images[1].channels;
  if (!p.direct && p.out_width >= kBlockRows) {
    if (second == 0 && first % kTile == 0 && first * p.kernel_width <= kDepth) {
      return first * p.kernel_width;
    }
    for (int64_t some = kDepth; some >= kDepth / 3; some -= kTile) {
      if (first % some == 0 && second % some == 0) {
        return some;
      }
    }
  }
  return round_up(ceil_div(depth, ceil_div(depth, kDepth)), kTile);
}

// Halves tasks until there are enough for the threads, and so that their sums fit. No bits depend
// on it.
void partition(Product& p, int64_t threads) {
  p.task_rows = std::min(p.bfloat16 ? kTaskRows : kFloatRows, round_up(p.rows, kLanes));
  p.task_panels = panels(p);
  const int64_t wanted = threads == 1 ? 1 : 4 * threads;
  const int64_t depth = packed_depth(p.bfloat16, p.depth);
  p.task_depth = p.bfloat16 ? choose_depth(p, depth) : kFloatDepth;
  const bool sums = depth > p.task_depth;
  while (true) {
    const int64_t columns = p.task_panels * kPanel;
    const bool large = (sums && p.task_rows * columns > kTaskSums) ||
                       columns * p.task_depth * (p.bfloat16 ? 2 : 4) > kTaskWeight;
    if (!large && tasks(p) >= wanted) {
      return;
    }
    if (p.task_panels > 1 && (large || p.task_panels * kPanel >= p.task_rows)) {
      p.task_panels = ceil_div(p.task_panels, 2);
    } else if (p.task_rows >= 4 * kLanes) {
      p.task_rows = round_up(ceil_div(p.task_rows, 2), kLanes);
    } else {
      return;
    }
  }
}

// Calls run_task(task, slot) for every task; a slot is used by one thread at a time.
void run_tasks(Product& p, int64_t slots, char* scratch) {
  const int64_t grain = p.bfloat16 ? kGrainBfloat16 : kGrainFloat;
  const int64_t weights = p.columns * p.depth;
  const int64_t worth =
      std::max(p.rows * weights / grain, weights * (p.bfloat16 ? 2 : 4) / kGrainWeight);
  int64_t threads = std::max<int64_t>(1, std::min(slots, worth));
  partition(p, threads);
  const int64_t count = tasks(p);
  threads = std::min(threads, count);
  const ProductKernel kernel = kernel_for(p.bfloat16).kernel;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      char* memory = scratch == nullptr ? reinterpret_cast<char*>(thread_scratch(kScratchBytes / 4))
                                        : scratch + slot * kScratchBytes;
      for (int64_t task = next++; task < count; task = next++) {
        kernel(p, task, memory);
      }
    }
  });
}

Activation activation_of(const std::string& name) {
  static const char* const names[] = {"", "silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"};
  for (int i = 0; i < 6; ++i) {
    if (name == names[i]) {
      return static_cast<Activation>(i);
    }
  }
  STD_TORCH_CHECK(
      false, "activation: expected '', silu, gelu, gelu_tanh, quick_gelu or geglu, got ", name);
}

}  // namespace

int64_t row_step(const Tensor& x, const int* order, int dims, int64_t width) {
  int64_t step = kUneven;
  int64_t expected = 0;
  for (int d = dims - 1; d >= 0; --d) {
    if (x.size(order[d]) == 1) {
      continue;
    }
    if (step != kUneven && x.stride(order[d]) != expected) {
      return kUneven;
    }
    step = step == kUneven ? x.stride(order[d]) : step;
    expected = x.stride(order[d]) * x.size(order[d]);
  }
  return (step == kUneven ? width : step) * element_bytes(x.scalar_type());
}

void set_product(Product& p, const Tensor& x, const Tensor& weight,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& sample_add,
                 const std::string& activation) {
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(x.is_cpu() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "x: expected float32 or bfloat16 on the CPU");
  p.bfloat16 = dtype == ScalarType::BFloat16;
  p.activation = activation_of(activation);
  const bool geglu = p.activation == Activation::Geglu;
  STD_TORCH_CHECK(!geglu || p.columns % 2 == 0, "weight: expected an even number of rows");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == dtype &&
                      weight.numel() == packed_size(p.bfloat16, geglu, p.columns, p.depth),
                  "weight: expected it of x's dtype, packed for this shape and activation");
  p.weight = static_cast<const char*>(weight.const_data_ptr());
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 &&
                        bias->size(0) == p.columns && (p.columns < 2 || bias->stride(0) == 1),
                    "bias: expected a dense (", p.columns, ",) of x's dtype");
    p.bias = static_cast<const char*>(bias->const_data_ptr());
  }
  if (sample_add.has_value()) {
    STD_TORCH_CHECK(sample_add->is_cpu() && sample_add->scalar_type() == dtype &&
                        sample_add->dim() == 2 && sample_add->size(0) == x.size(0) &&
                        sample_add->size(1) == p.columns &&
                        (p.columns < 2 || sample_add->stride(1) == 1),
                    "sample_add: expected (batch, ", p.columns, ") with dense rows, of x's dtype");
    p.sample_add = {static_cast<const char*>(sample_add->const_data_ptr()),
                    sample_add->stride(0) * element_bytes(dtype)};
  }
}

void make_dense(std::optional<Tensor>& given) {
  if (given.has_value() && given->dim() > 0 && given->stride(given->dim() - 1) != 1) {
    given = torch::stable::contiguous(*given);
  }
}

Tensor packed(const Tensor& weight, bool geglu) {
  const bool bfloat16 = weight.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(weight.is_cpu() && (bfloat16 || weight.scalar_type() == ScalarType::Float) &&
                      weight.dim() >= 2 && weight.numel() > 0 &&
                      (!geglu || weight.size(0) % 2 == 0),
                  "weight: expected (columns, ...), float32 or bfloat16 on the CPU, not empty");
  // A convolution's as (columns, height, width, channels).
  constexpr auto kRows = torch::headeronly::MemoryFormat::Contiguous;
  constexpr auto kPixels = torch::headeronly::MemoryFormat::ChannelsLast;
  const Tensor dense = torch::stable::contiguous(weight, weight.dim() == 4 ? kPixels : kRows);
  const int64_t columns = weight.size(0);
  const int64_t depth = weight.numel() / columns;
  Tensor out = torch::stable::new_empty(weight, {packed_size(bfloat16, geglu, columns, depth)});
  prefer_large_pages(out.mutable_data_ptr(),
                     static_cast<int64_t>(out.numel() * out.element_size()));
  pack(bfloat16, geglu, columns, depth, static_cast<const char*>(dense.const_data_ptr()),
       static_cast<char*>(out.mutable_data_ptr()));
  return out;
}

void run(Product& p) { run_tasks(p, torch::stable::get_num_threads(), nullptr); }

// With a scratch of no elements every thread keeps memory of its own.
void run_in(Product& p, Tensor& scratch) {
  if (scratch.numel() == 0) {
    run_tasks(p, torch::stable::get_num_threads(), nullptr);
    return;
  }
  STD_TORCH_CHECK(scratch.is_cpu() && scratch.is_contiguous() &&
                      scratch.numel() * scratch.element_size() >= kScratchBytes,
                  "scratch: expected a dense tensor on the CPU of at least ", kScratchBytes,
                  " bytes");
  const int64_t slots =
      static_cast<int64_t>(scratch.numel() * scratch.element_size()) / kScratchBytes;
  run_tasks(p, std::min<int64_t>(slots, torch::stable::get_num_threads()),
            static_cast<char*>(scratch.mutable_data_ptr()));
}

const char* instruction_set() { return kernel_for(true).name; }

}  // namespace heatsink
