// heatsink::lora_rows on the CPU: arguments, the choice of a kernel, and the split among threads.

#include "lora_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "instructions.h"
#include "lora_terms.h"
#include "recorder.h"
#include "scratch.h"

namespace {

using heatsink::ActiveRow;
using heatsink::Element;
using heatsink::kLanes;
using heatsink::LoraKernel;
using heatsink::LoraRows;
using heatsink::LoraStep;
using heatsink::Packed;
using heatsink::RowAdapter;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainProducts = 1 << 17;  // products that are worth a thread
constexpr int64_t kImageFloats = 1 << 22;    // of the images that are turned together
constexpr int64_t kTokenStep = 12;           // tokens that a kernel works on side by side at most

// Uses of a thread's memory, beside that of a task.

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::Float;
    case ScalarType::Half:
      return Element::Half;
    case ScalarType::BFloat16:
      return Element::BFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float16, bfloat16 or float32");
  }
}

// The step through dimensions first..last-1 as if they were one, or -1 if there is none.
int64_t joined_stride(const Tensor& x, int64_t first, int64_t last) {
  int64_t step = -1;
  int64_t expected = 0;
  for (int64_t d = last - 1; d >= first; --d) {
    if (x.size(d) == 1) {
      continue;
    }
    if (step >= 0 && x.stride(d) != expected) {
      return -1;
    }
    step = step >= 0 ? step : x.stride(d);
    expected = x.stride(d) * x.size(d);
  }
  return step >= 0 ? step : 0;
}

std::vector<int64_t> integers(const Tensor& x) {
  const Tensor dense = torch::stable::contiguous(x);
  std::vector<int64_t> found(static_cast<size_t>(x.numel()));
  if (x.scalar_type() == ScalarType::Long) {
    std::copy_n(static_cast<const int64_t*>(dense.const_data_ptr()), x.numel(), found.begin());
  } else {
    std::copy_n(static_cast<const int32_t*>(dense.const_data_ptr()), x.numel(), found.begin());
  }
  return found;
}

// Which rows have which adapters, and the slots among them in fp32.
struct Table {
  std::vector<Packed> packed;
  std::vector<RowAdapter> adapters;
  std::vector<ActiveRow> rows;
  int64_t blocks = 0;  // vectors of ranks of the row that has most
  int64_t widest = 0;  // ranks of the row that has most
  int64_t ranks = 0;   // of all rows

  Table(const Tensor& a, const Tensor& slots, const Tensor& scales,
        const std::optional<Tensor>& ranks_given, LoraRows& call) {
    const std::vector<int64_t> table = integers(slots);
    std::vector<int64_t> of_slot;
    if (ranks_given.has_value()) {
      of_slot = integers(*ranks_given);
    }
    const Tensor dense = torch::stable::contiguous(scales);
    const auto* factors = static_cast<const float*>(dense.const_data_ptr());
    std::vector<int64_t> places(static_cast<size_t>(a.size(0)), -1);
    std::vector<int64_t> uses;
    const int64_t count = slots.size(1);
    for (int64_t row = 0; row < slots.size(0); ++row) {
      const auto first = static_cast<int64_t>(adapters.size());
      bool used = false;
      int64_t row_blocks = 0;
      const int64_t before = ranks;
      for (int64_t i = row * count; i < (row + 1) * count; ++i) {
        const int64_t slot = table[i];
        STD_TORCH_CHECK(slot < a.size(0), "slots: expected slots of the bank, up to ",
                        a.size(0) - 1, ", got ", slot);
        if (slot < 0) {
          continue;
        }
        used = true;
        int64_t rank = a.size(1);
        if (!of_slot.empty()) {
          rank = std::min(rank, of_slot[slot]);
        }
        if (rank <= 0) {
          continue;
        }
        if (places[slot] < 0) {
          places[slot] = static_cast<int64_t>(packed.size());
          packed.push_back({slot, rank, nullptr, nullptr});
        }
        uses.push_back(places[slot]);
        adapters.push_back({nullptr, factors[i]});
        row_blocks += (rank + kLanes - 1) / kLanes;
        ranks += rank;
      }
      if (used) {
        rows.push_back({row, first, static_cast<int64_t>(adapters.size())});
        blocks = std::max(blocks, row_blocks);
        widest = std::max(widest, ranks - before);
      }
    }
    for (size_t i = 0; i < adapters.size(); ++i) {
      adapters[i].packed = &packed[uses[i]];
    }
    call.packed = packed.data();
    call.adapters = adapters.data();
    call.rows = rows.data();
  }

  // Gives every slot its memory.
  void place(const LoraRows& call) {
    const int64_t panel = call.taps * heatsink::channels_of_panel(call);
    const int64_t pitch = heatsink::output_pitch(call);
    int64_t floats = 0;
    for (const Packed& slot : packed) {
      floats += heatsink::round_up(slot.rank, kLanes) * panel + slot.rank * pitch;
    }
    float* next = heatsink::thread_scratch(floats, heatsink::kBank);
    for (Packed& slot : packed) {
      slot.down = next;
      slot.up = next + heatsink::round_up(slot.rank, kLanes) * panel;
      next = slot.up + slot.rank * pitch;
    }
  }
};

void describe_bank(const Tensor& a, const Tensor& b, LoraRows& call) {
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "b: expected a's dtype");
  call.bank = element_of(a);
  call.a = static_cast<const char*>(a.const_data_ptr());
  call.b = static_cast<const char*>(b.const_data_ptr());
  call.a_slot = a.stride(0);
  call.a_rank = a.stride(1);
  call.a_channel = a.stride(2);
  call.b_slot = b.stride(0);
  call.b_rank = b.stride(1);
  call.b_output = b.stride(2);
  call.inputs = a.size(2);
  call.outputs = b.size(2);
  call.taps = a.dim() == 3 ? 1 : a.size(3) * a.size(4);
  call.kernel_w = a.dim() == 3 ? 1 : a.size(4);
  if (a.dim() == 5) {
    call.a_tap = a.size(4) > 1 ? a.stride(4) : a.stride(3);
  }
}

// Tokens as an image of one column.
void describe_tokens(const Tensor& x, LoraRows& call) {
  const int64_t last = x.dim() - 1;
  const int64_t step = joined_stride(x, 1, last);
  call.tokens = x.numel() / (x.size(0) * x.size(last));
  call.x = {static_cast<const char*>(x.const_data_ptr()),
            call.element,
            x.stride(0),
            step,
            0,
            x.stride(last)};
  call.height = call.tokens;
  call.width = 1;
  call.out_width = 1;
}

void describe_images(const Tensor& x, const Tensor& y, LoraRows& call) {
  call.x = {static_cast<const char*>(x.const_data_ptr()),
            call.element,
            x.stride(0),
            x.stride(2),
            x.stride(3),
            x.stride(1)};
  call.height = x.size(2);
  call.width = x.size(3);
  call.out_width = y.size(3);
  call.tokens = y.size(2) * y.size(3);
}

// How many tokens a task has. No bits depend on it, so the threads may.
int64_t choose_chunk(int64_t tokens, int64_t rows) {
  int64_t chunk = std::min(heatsink::kTokens, heatsink::round_up(tokens, kTokenStep));
  const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  while (chunk > kTokenStep && rows * ((tokens + chunk - 1) / chunk) < wanted) {
    chunk -= kTokenStep;
  }
  return chunk;
}

// Does a step of a call for `items`, of so many products each.
void in_parallel(const LoraRows& call, const Table& table, LoraStep step, int64_t items,
                 int64_t products) {
  static const LoraKernel kernel = HEATSINK_CHOOSE(lora_rows);
  const int64_t floats = heatsink::lora_scratch(table.widest, table.blocks);
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / std::max<int64_t>(1, products));
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    kernel(call, step, begin, end, heatsink::thread_scratch(floats));
  });
}

// Brings the adapters that are used into the kernels' form.
void pack(LoraRows& call, Table& table) {
  table.place(call);
  in_parallel(call, table, LoraStep::Pack,
              static_cast<int64_t>(table.packed.size()) * (call.taps + 1), call.inputs * kLanes);
}

// Products of a chunk of a row.
int64_t products_of(const LoraRows& call, const Table& table) {
  const int64_t rows = std::max<int64_t>(1, static_cast<int64_t>(table.rows.size()));
  const int64_t mean_rank = std::max<int64_t>(1, table.ranks / rows);
  return call.chunk * mean_rank * (call.inputs * call.taps + call.outputs);
}

void run(LoraRows& call, Table& table, bool turned) {
  const auto rows = static_cast<int64_t>(table.rows.size());
  const int64_t line = call.width * heatsink::image_pitch(call);
  const int64_t together =
      turned ? std::max<int64_t>(1, kImageFloats / (call.height * line)) : rows;
  call.chunk = choose_chunk(call.tokens, std::min(rows, together));
  const int64_t chunks = (call.tokens + call.chunk - 1) / call.chunk;
  pack(call, table);
  for (int64_t first = 0; first < rows; first += together) {
    const int64_t count = std::min(together, rows - first);
    call.rows = table.rows.data() + first;
    if (turned) {
      call.image = heatsink::thread_scratch(count * call.height * line, heatsink::kImages);
      in_parallel(call, table, LoraStep::Image, count * call.height, line);
    }
    in_parallel(call, table, LoraStep::Rows, count * chunks, products_of(call, table));
  }
}

// y: (R, ..., out) and x: (R, ..., in), or (R, out, H', W') and (R, in, H, W); a: (S, rank, in) or
// (S, rank, in, kh, kw); b: (S, rank, out), of any float dtype both. Changes y.
void lora_rows(Tensor y, Tensor x, Tensor a, Tensor b, Tensor slots, Tensor scales,
               std::optional<Tensor> ranks, int64_t stride_h, int64_t stride_w, int64_t pad_h,
               int64_t pad_w, int64_t dilation_h, int64_t dilation_w) {
  const bool linear = a.dim() == 3;
  STD_TORCH_CHECK(y.is_cpu() && (linear || a.dim() == 5) && b.dim() == 3 && y.dim() == x.dim() &&
                      slots.dim() == 2 && slots.size(0) == y.size(0),
                  "lora_rows: expected the shapes that kernels/lora_rows.py checks");
  LoraRows call{};
  call.element = element_of(y);
  Table table(a, slots, scales, ranks, call);
  if (table.rows.empty() || y.numel() == 0) {
    return;
  }
  if (!linear && a.size(3) > 1 && a.size(4) > 1 && a.stride(3) != a.size(4) * a.stride(4)) {
    // Taps that do not follow one another at one step.
    a = torch::stable::contiguous(a);
  }
  describe_bank(a, b, call);
  const int64_t channels = linear ? y.dim() - 1 : 1;
  const int64_t first = linear ? 1 : 2;
  const int64_t last = linear ? y.dim() - 1 : 4;
  Tensor out = joined_stride(y, first, last) < 0 ? torch::stable::contiguous(y) : y;
  call.y = static_cast<char*>(out.mutable_data_ptr());
  call.y_row = out.stride(0);
  call.y_token = joined_stride(out, first, last);
  call.y_output = out.size(channels) == 1 ? 1 : out.stride(channels);
  call.step_h = stride_h;
  call.step_w = stride_w;
  call.pad_h = pad_h;
  call.pad_w = pad_w;
  call.dilation_h = dilation_h;
  call.dilation_w = dilation_w;
  bool turned = false;
  if (linear) {
    if (joined_stride(x, 1, x.dim() - 1) < 0) {
      x = torch::stable::contiguous(x);
    }
    describe_tokens(x, call);
  } else {
    describe_images(x, y, call);
    turned = x.size(1) > 1 && x.stride(1) != 1;
  }
  run(call, table, turned);
  if (out.mutable_data_ptr() != y.mutable_data_ptr()) {
    torch::stable::copy_(y, out);
  }
}

}  // namespace

namespace heatsink {

struct LoraTerms::State {
  LoraRows call{};
  Table table;

  State(const Tensor& a, const Tensor& slots, const Tensor& scales,
        const std::optional<Tensor>& ranks)
      : table(a, slots, scales, ranks, call) {}
};

LoraTerms::LoraTerms(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& slots,
                     const Tensor& scales, const std::optional<Tensor>& ranks) {
  STD_TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && b.size(0) == a.size(0) &&
                      b.size(1) == a.size(1) && a.size(2) == x.size(x.dim() - 1) &&
                      slots.dim() == 2 && slots.size(0) == x.size(0) &&
                      joined_stride(x, 1, x.dim() - 1) >= 0,
                  "lora_linear: expected the shapes that kernels/lora_linear.py checks");
  state_ = std::make_unique<State>(a, slots, scales, ranks);
  LoraRows& call = state_->call;
  for (const ActiveRow& row : state_->table.rows) {
    places_.resize(static_cast<size_t>(row.row + 1), -1);
    places_[row.row] = &row - state_->table.rows.data();
  }
  places_.resize(static_cast<size_t>(x.size(0)), -1);
  if (state_->table.rows.empty()) {
    return;
  }
  call.element = element_of(x);
  describe_bank(a, b, call);
  describe_tokens(x, call);
  call.step_h = call.step_w = call.dilation_h = call.dilation_w = 1;
  call.y_token = call.outputs;
  call.y_output = 1;
  pack(call, state_->table);
}

LoraTerms::~LoraTerms() = default;

void LoraTerms::add(int64_t sample, int64_t first, int64_t tokens, char* y) const {
  const int64_t size = call_bytes();
  LoraRows part = state_->call;
  part.rows = state_->table.rows.data() + places_[sample];
  part.x.data += first * part.x.h * size;
  part.tokens = part.height = tokens;
  part.chunk = choose_chunk(tokens, 1);
  // Of one row only, wherever it is.
  part.y = y;
  part.y_row = 0;
  in_parallel(part, state_->table, LoraStep::Rows, (tokens + part.chunk - 1) / part.chunk,
              products_of(part, state_->table));
}

int64_t LoraTerms::call_bytes() const { return state_->call.element == Element::Float ? 4 : 2; }

}  // namespace heatsink

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) { m.impl("lora_rows", HEATSINK_RECORDABLE(lora_rows)); }
