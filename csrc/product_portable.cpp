// The product's kernel in plain C++, for processors that have no kernel of their own.

#include <cstdint>
#include <cstring>

#include "flush.h"
#include "lanes_portable.h"
#include "product.h"
#include "product_kernel.h"

namespace heatsink {
namespace {

struct Products : Portable {
  static constexpr int kFloatRows = 4;
  static constexpr int kPairRows = 2;

  static void narrow(const Vector& x, char* to) { heatsink::narrow_bfloat16(x, to); }
};

}  // namespace

void product_portable(const Product& p, int64_t task, char* scratch) {
  if (p.bfloat16) {
    const FlushDenormals flush;
    run_task<Bfloat16Pairs<Products>>(p, task, scratch);
  } else {
    run_task<Float<Products>>(p, task, scratch);
  }
}

}  // namespace heatsink
