// heatsink::attention on the CPU: arguments, the choice of a kernel, and the split among threads.

#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "float_tensor.h"
#include "given_out.h"
#include "instructions.h"
#include "recorder.h"
#include "scratch.h"

namespace {

using heatsink::Attention;
using heatsink::AttentionKernel;
using heatsink::Element;
using heatsink::Operand;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;             // queries a task has at most
constexpr int64_t kChunkFloats = 1 << 17;    // and what they may take up, so that they stay in L2
constexpr int64_t kGrainProducts = 1 << 18;  // products that are worth a thread

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::Float;
    case ScalarType::Half:
      return Element::Half;
    case ScalarType::BFloat16:
      return Element::BFloat16;
    default:
      STD_TORCH_CHECK(false, "q: dtype not supported by attention");
  }
}

void check_like(const char* name, const Tensor& x, const Tensor& q, int64_t tokens) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.scalar_type() == q.scalar_type() &&
                      x.size(0) == q.size(0) && x.size(1) == tokens && x.size(2) == q.size(2) &&
                      x.size(3) == q.size(3),
                  name, ": expected (batch, keys, heads, channels) like q, of its dtype");
}

Operand operand(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// A bias of up to four dimensions that broadcast to (batch, heads, queries, keys).
Operand bias_operand(const std::optional<Tensor>& bias, const Attention& a, ScalarType dtype) {
  if (!bias.has_value()) {
    return {nullptr, 0, 0, 0, 0};
  }
  STD_TORCH_CHECK(bias->dim() <= 4 && bias->is_cpu() && bias->scalar_type() == dtype,
                  "bias: expected at most four dimensions, of q's dtype");
  const int64_t wanted[4] = {a.batch, a.heads, a.queries, a.keys};
  int64_t strides[4] = {0, 0, 0, 0};
  for (int64_t d = 0; d < bias->dim(); ++d) {
    const int64_t place = d + 4 - bias->dim();
    STD_TORCH_CHECK(bias->size(d) == 1 || bias->size(d) == wanted[place],
                    "bias: expected a shape that broadcasts to (batch, heads, queries, keys)");
    strides[place] = bias->size(d) == 1 ? 0 : bias->stride(d);
  }
  return {bias->const_data_ptr(), strides[0], strides[2], strides[1], strides[3]};
}

// What a query that sees no key gets.
void fill_zeros(const Attention& a) {
  const int64_t bytes = a.element == Element::Float ? 4 : 2;
  for (int64_t row = 0; row < a.batch * a.queries * a.heads; ++row) {
    const int64_t token = row / a.heads;
    const int64_t place = token / a.queries * a.out_batch + token % a.queries * a.out_token +
                          row % a.heads * a.out_head;
    std::memset(static_cast<char*>(a.out) + place * bytes, 0,
                static_cast<size_t>(a.channels * bytes));
  }
}

int64_t count_tasks(const Attention& a) {
  return a.batch * a.heads * ((a.queries + a.chunk - 1) / a.chunk);
}

// How many queries a task has, a multiple of 32. No bits depend on it, so the threads may.
int64_t choose_chunk(Attention a) {
  a.chunk = std::min(kChunk, heatsink::round_up(a.queries, 2 * heatsink::kLanes));
  const int64_t wanted = 2 * static_cast<int64_t>(torch::stable::get_num_threads());
  while (a.chunk > 2 * heatsink::kLanes &&
         (a.chunk * a.channels > kChunkFloats || count_tasks(a) < wanted)) {
    a.chunk = heatsink::round_up(a.chunk / 2, 2 * heatsink::kLanes);
  }
  return a.chunk;
}

// AMX has no products of float32: they run in AVX-512.
AttentionKernel choose_kernel() {
#ifdef HEATSINK_X86_KERNELS
  return heatsink::choose_instructions(&heatsink::attention_avx512, &heatsink::attention_avx2,
                                       &heatsink::attention_portable, &heatsink::attention_amx);
#else
  return HEATSINK_CHOOSE(attention);
#endif
}

// q: (batch, queries, heads, channels); k, v: (batch, keys, heads, channels); any strides. `out` is
// like q, its channels dense.
void attention_out(Tensor q, Tensor k, Tensor v, double scale, bool causal,
                   std::optional<Tensor> bias, Tensor out) {
  STD_TORCH_CHECK(q.dim() == 4 && q.is_cpu(), "q: expected (batch, queries, heads, channels)");
  STD_TORCH_CHECK(k.dim() == 4, "k: expected (batch, keys, heads, channels)");
  Attention a{};
  a.element = element_of(q);
  a.batch = q.size(0);
  a.queries = q.size(1);
  a.heads = q.size(2);
  a.channels = q.size(3);
  a.keys = k.size(1);
  check_like("k", k, q, a.keys);
  check_like("v", v, q, a.keys);
  a.scale = static_cast<float>(scale);
  a.causal = causal;
  a.q = operand(q);
  a.k = operand(k);
  a.v = operand(v);
  a.bias = bias_operand(bias, a, q.scalar_type());
  check_out(out, q);
  check_apart(out, q, "q");
  check_apart(out, k, "k");
  check_apart(out, v, "v");
  check_apart(out, bias, "bias");
  STD_TORCH_CHECK(a.channels <= 1 || out.stride(3) == 1, "out: expected dense channels");
  if (out.numel() == 0) {
    return;
  }
  a.out = out.mutable_data_ptr();
  a.out_batch = out.stride(0);
  a.out_token = out.stride(1);
  a.out_head = out.stride(2);
  if (a.keys == 0) {
    fill_zeros(a);
    return;
  }
  a.chunk = choose_chunk(a);

  static const AttentionKernel kernel = choose_kernel();
  const int64_t products = 2 * a.chunk * a.keys * a.channels;
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / products);
  const int64_t floats = heatsink::scratch_floats(a);
  torch::stable::parallel_for(0, count_tasks(a), grain, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, heatsink::thread_scratch(floats));
  });
}

// Returns a contiguous tensor like q.
Tensor attention(Tensor q, Tensor k, Tensor v, double scale, bool causal,
                 std::optional<Tensor> bias) {
  Tensor out = empty_rows(q);
  attention_out(q, k, v, scale, causal, bias, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heatsink, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_out", HEATSINK_RECORDABLE(attention_out));
}
