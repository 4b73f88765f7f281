"""The bodies of `heatsink.kernels.attention_fp8` that measure and quantise Q, K and V."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.attention_tiles import at, load_tile, store_tile

# The largest finite value of e4m3.
E4M3_MAX = tl.constexpr(448.0)
INT8_MAX = tl.constexpr(127.0)
# Chunks whose sums are read at a time.
GROUP = tl.constexpr(16)


@triton.jit
def _largest(x, axis: tl.constexpr):
    # The largest magnitude along an axis; NaN if there is one, which tl.max may pass over.
    bad = tl.max((x != x).to(tl.int32), axis)
    return tl.where(bad > 0, float("nan"), tl.max(tl.abs(x), axis))


@triton.jit
def _over_chunks(ptr, index, chunks, WIDTH: tl.constexpr, PEAK: tl.constexpr):
    # The sum, or with PEAK the largest, of each column over a head's chunks, in their order.
    offs_c = tl.arange(0, GROUP)
    offs_d = tl.arange(0, WIDTH)
    ptr += index.to(tl.int64) * chunks * WIDTH
    total = tl.zeros([WIDTH], tl.float32)
    for first in range(0, chunks, GROUP):
        offs = (first + offs_c)[:, None] * WIDTH + offs_d[None, :]
        part = tl.load(ptr + offs, mask=(first + offs_c)[:, None] < chunks, other=0.0)
        if PEAK:
            part = _largest(part, 0)
            total = tl.where((part > total) | (part != part), part, total)
        else:
            total += tl.sum(part, 0)
    return total


@triton.jit(
    do_not_specialize=[
        "heads",
        "chunks",
        "seq",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "stride_vb",
        "stride_vh",
        "stride_vn",
    ]
)
def _attention_fp8_stats_kernel(
    k_ptr,
    v_ptr,
    sums_ptr,
    peaks_ptr,
    heads,
    chunks,
    seq,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PURE: tl.constexpr,
):
    # A chunk of tokens: the sum of K and, if V is quantised, the largest magnitude of V.
    index = tl.program_id(0)
    chunk = tl.program_id(1)
    start = chunk * CHUNK
    out = (index.to(tl.int64) * chunks + chunk) * WIDTH + tl.arange(0, WIDTH)
    first = tl.cast(start, tl.int64)
    k_ptr = at(k_ptr, stride_kb * UNIT, stride_kh * UNIT, index // heads, index % heads)
    k_ptr += first * stride_kn * UNIT
    k = load_tile(k_ptr, stride_kn * UNIT, 1, seq - start, CHUNK, 0, WIDTH, HEAD_DIM, True)
    tl.store(sums_ptr + out, tl.sum(k.to(tl.float32), 0))
    if PURE:
        v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, index // heads, index % heads)
        v_ptr += first * stride_vn * UNIT
        v = load_tile(v_ptr, stride_vn * UNIT, 1, seq - start, CHUNK, 0, WIDTH, HEAD_DIM, True)
        tl.store(peaks_ptr + out, _largest(v.to(tl.float32), 0))


@triton.jit
def to_e4m3(x, EMULATE: tl.constexpr):
    # EMULATE is for the interpreter, which cuts bits off: rounded to e4m3's values before, by
    # sums that are too large to hold more than its 4 bits, or what is below its least normal.
    if EMULATE:
        large = x * 1048577.0
        normal = large - (large - x)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _rounded(x, top, PURE: tl.constexpr, EMULATE: tl.constexpr):
    # Values within -top to top as 8 bits, and what a unit of them is worth.
    safe = tl.where(top == 0.0, 1.0, top)
    if PURE:
        return to_e4m3(x * (E4M3_MAX / safe), EMULATE), top / E4M3_MAX
    else:
        x = x * (INT8_MAX / safe)
        return (x + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int8), top / INT8_MAX


@triton.jit(
    do_not_specialize=[
        "heads",
        "chunks",
        "seq",
        "blocks",
        "stride_xb",
        "stride_xh",
        "stride_xs",
    ]
)
def _attention_fp8_rows_kernel(
    x_ptr,
    sums_ptr,
    out_ptr,
    scale_ptr,
    heads,
    chunks,
    seq,
    blocks,
    factor,
    stride_xb,
    stride_xh,
    stride_xs,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PURE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # A block of Q with a scale a token, or of K without its mean, with a scale a block.
    index = tl.program_id(0)
    block = tl.program_id(1)
    rows = seq - block * BLOCK
    x_ptr = at(x_ptr, stride_xb * UNIT, stride_xh * UNIT, index // heads, index % heads)
    x_ptr += tl.cast(block, tl.int64) * BLOCK * stride_xs * UNIT
    x = load_tile(x_ptr, stride_xs * UNIT, 1, rows, BLOCK, 0, WIDTH, HEAD_DIM, True)
    x = x.to(tl.float32)
    place = index.to(tl.int64) * blocks + block
    offs = tl.arange(0, BLOCK)
    if KEYS:
        x -= _over_chunks(sums_ptr, index, chunks, WIDTH, False)[None, :] / seq
        x = tl.where(offs[:, None] < rows, x, 0.0)
        top = _largest(_largest(x, 1), 0)
        x, unit = _rounded(x, top, PURE, EMULATE)
        tl.store(scale_ptr + place, unit)
    else:
        top = _largest(x, 1)
        x, unit = _rounded(x, top[:, None], PURE, EMULATE)
        tl.store(scale_ptr + place * BLOCK + offs, tl.sum(unit, 1) * factor)
    out_ptr += place * BLOCK * WIDTH
    store_tile(out_ptr, x, WIDTH, BLOCK, BLOCK, 0, WIDTH, WIDTH)


@triton.jit(
    do_not_specialize=[
        "heads",
        "chunks",
        "seq",
        "blocks",
        "stride_vb",
        "stride_vh",
        "stride_vn",
    ]
)
def _attention_fp8_values_kernel(
    v_ptr,
    peaks_ptr,
    out_ptr,
    scale_ptr,
    heads,
    chunks,
    seq,
    blocks,
    stride_vb,
    stride_vh,
    stride_vn,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # A block of V, transposed, with a scale a channel: 8-bit products want tokens side by side.
    index = tl.program_id(0)
    block = tl.program_id(1)
    v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, index // heads, index % heads)
    v_ptr += tl.cast(block, tl.int64) * BLOCK * stride_vn * UNIT
    rows = seq - block * BLOCK
    v = load_tile(v_ptr, stride_vn * UNIT, 1, rows, BLOCK, 0, WIDTH, HEAD_DIM, True)
    top = _over_chunks(peaks_ptr, index, chunks, WIDTH, True)
    offs = index.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    if block == 0:
        tl.store(scale_ptr + offs, top / E4M3_MAX)
    v, _ = _rounded(v.to(tl.float32), top[None, :], True, EMULATE)
    offs_n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    width = blocks.to(tl.int64) * BLOCK
    tl.store(out_ptr + offs[:, None] * width + offs_n[None, :], tl.trans(v))
