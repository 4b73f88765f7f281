"""The body of `heatsink.kernels.rotary`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["seq_len"])
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    seq_len,
    heads,
    head_dim,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_xd,
    stride_cb,
    stride_cs,
    stride_cd,
    stride_sb,
    stride_ss,
    stride_sd,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A program turns some heads of one token.
    token = tl.program_id(0).to(tl.int64)
    sample, place = token // seq_len, token % seq_len
    half = head_dim // 2
    offs_h = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_p = tl.arange(0, BLOCK_D // 2).to(tl.int64)
    mask_h = offs_h[:, None] < heads
    mask_p = offs_p < half
    cos_offs = sample * stride_cb + place * stride_cs + offs_p * stride_cd
    sin_offs = sample * stride_sb + place * stride_ss + offs_p * stride_sd
    cos = tl.load(cos_ptr + cos_offs, mask=mask_p, other=0.0)[None, :]
    sin = tl.load(sin_ptr + sin_offs, mask=mask_p, other=0.0)[None, :]

    x_rows = x_ptr + sample * stride_xb + place * stride_xs + offs_h[:, None] * stride_xh
    out_rows = out_ptr + (token * heads + offs_h[:, None]) * head_dim
    if INTERLEAVED:
        # Read and written as they lie, so that neighbouring threads touch neighbouring channels.
        offs_d = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
        mask = mask_h & (offs_d < head_dim)
        x = tl.load(x_rows + offs_d * stride_xd, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D // 2, 2)))
        turned = tl.join(a * cos - b * sin, b * cos + a * sin)
        out = tl.reshape(turned, (BLOCK_H, BLOCK_D))
        tl.store(out_rows + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mask = mask_h & mask_p[None, :]
        x_offs = offs_p[None, :] * stride_xd
        a = tl.load(x_rows + x_offs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_rows + x_offs + half * stride_xd, mask=mask, other=0.0).to(tl.float32)
        first = (a * cos - b * sin).to(out_ptr.dtype.element_ty)
        second = (b * cos + a * sin).to(out_ptr.dtype.element_ty)
        tl.store(out_rows + offs_p[None, :], first, mask=mask)
        tl.store(out_rows + half + offs_p[None, :], second, mask=mask)
