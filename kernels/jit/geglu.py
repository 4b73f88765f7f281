"""The body of `heatsink.kernels.geglu`."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.gelu import gelu


@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    x_ptr,
    out_ptr,
    rows,
    width,
    stride_xr,
    stride_or,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_W)
    offs_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (offs_r[:, None] < rows) & (offs_w[None, :] < width)
    x_offs = offs_r[:, None] * stride_xr + offs_w[None, :]
    hidden = tl.load(x_ptr + x_offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + x_offs + width, mask=mask, other=0.0).to(tl.float32)
    out = hidden * gelu(gate)
    out_offs = offs_r[:, None] * stride_or + offs_w[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)
