"""The body of `heatsink.kernels.silu_mul`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def _silu_mul_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    width,
    stride_gr,
    stride_ur,
    stride_or,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    blocks = tl.cdiv(width, BLOCK_W)
    offs_r = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_w = tl.program_id(0) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
    mask = (offs_r[:, None] < rows) & (offs_w[None, :] < width)
    gate_offs = offs_r[:, None] * stride_gr + offs_w[None, :]
    up_offs = offs_r[:, None] * stride_ur + offs_w[None, :]
    gate = tl.load(gate_ptr + gate_offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + up_offs, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    out_offs = offs_r[:, None] * stride_or + offs_w[None, :]
    tl.store(out_ptr + out_offs, out.to(out_ptr.dtype.element_ty), mask=mask)
