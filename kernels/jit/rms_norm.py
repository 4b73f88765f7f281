"""The body of `heatsink.kernels.rms_norm`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    inner,
    width,
    stride_xo,
    stride_xi,
    eps,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.arange(0, BLOCK_W)
    mask_w = offs_w < width
    mask = (row[:, None] < rows) & mask_w[None, :]
    start = row // inner * stride_xo + row % inner * stride_xi
    x = tl.load(x_ptr + start[:, None] + offs_w[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
    y = x * inverse[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row[:, None] * width + offs_w[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
