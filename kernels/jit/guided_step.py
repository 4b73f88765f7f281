"""The body of `heatsink.kernels.guided_step`; every operation is rounded by itself."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.noise import normals


@triton.jit(do_not_specialize=["out_rows", "tiles"])
def _guided_step_kernel(
    x_ptr,
    out_ptr,
    x0_prev_ptr,
    coef_ptr,
    guidance_ptr,
    uncond_ptr,
    cond_ptr,
    seeds_ptr,
    steps_ptr,
    x_next_ptr,
    x0_ptr,
    out_rows,
    count,
    tiles,
    channels,
    stride_xr,
    stride_or,
    stride_pr,
    PURPOSE: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program advances 4 * BLOCK elements of one row, BLOCK of noise's blocks of four.
    row = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    offs = tile * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    mask = offs < count

    coef = coef_ptr + row * 8
    p, q = tl.load(coef + 2), tl.load(coef + 3)
    a, b = tl.load(coef + 4), tl.load(coef + 5)
    c, d = tl.load(coef + 6), tl.load(coef + 7)
    uncond = tl.load(uncond_ptr + row).to(tl.int64)
    cond = tl.load(cond_ptr + row).to(tl.int64)

    if CHANNELS_INSIDE:
        pixels = count // channels
        out_offs = (offs % pixels) * channels + offs // pixels
    else:
        out_offs = offs
    # A row that `out` has not gives NaN, for nobody can be told here.
    mask_c = offs < tl.where((cond >= 0) & (cond < out_rows), count, 0)
    out = tl.load(out_ptr + cond * stride_or + out_offs, mask=mask_c, other=float("nan"))
    out = out.to(tl.float32)
    if uncond != cond:
        mask_u = offs < tl.where((uncond >= 0) & (uncond < out_rows), count, 0)
        low = tl.load(out_ptr + uncond * stride_or + out_offs, mask=mask_u, other=float("nan"))
        low = low.to(tl.float32)
        out = low + tl.load(guidance_ptr + row) * (out - low)

    x = tl.load(x_ptr + row * stride_xr + offs, mask=mask, other=0.0)
    x0 = p * x + q * out
    x_next = a * x + b * x0
    if c != 0.0:
        x0_prev = tl.load(x0_prev_ptr + row * stride_pr + offs, mask=mask, other=0.0)
        x_next = x_next + c * x0_prev
    if d != 0.0:
        key, step = tl.load(seeds_ptr + row), tl.load(steps_ptr + row)
        purpose = tl.full((), PURPOSE, tl.uint32)
        x_next = x_next + d * normals(key, step, purpose, tile * BLOCK, BLOCK)
    tl.store(x_next_ptr + row * count + offs, x_next, mask=mask)
    tl.store(x0_ptr + row * count + offs, x0, mask=mask)
