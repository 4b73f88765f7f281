"""The body of `heatsink.kernels.layer_norm`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "inner", "of_sample"])
def _layer_norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    out_ptr,
    rows,
    inner,
    of_sample,
    width,
    stride_xo,
    stride_xi,
    stride_sn,
    stride_tn,
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
    mean = tl.sum(x, 1) / width
    distance = tl.where(mask, x - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(distance * distance, 1) / width + eps)
    y = distance * inverse[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_w, mask=mask_w, other=0.0).to(tl.float32)[None, :]
    n = row // of_sample
    if scale_ptr is not None:
        scale = scale_ptr + n[:, None] * stride_sn + offs_w[None, :]
        y *= 1.0 + tl.load(scale, mask=mask, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = shift_ptr + n[:, None] * stride_tn + offs_w[None, :]
        y += tl.load(shift, mask=mask, other=0.0).to(tl.float32)
    out = out_ptr + row[:, None] * width + offs_w[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
