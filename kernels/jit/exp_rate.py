"""The body of `heatsink.kernels.exp_rate`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp_rate_kernel(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = 1.0 / (1.0 + (offs % 997).to(tl.float32))
    for _ in range(REPEATS):
        x = tl.exp2(-x)
    tl.store(out_ptr + offs, x)
