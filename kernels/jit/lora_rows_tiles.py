"""What the bodies of `heatsink.kernels.lora_rows` share: one tile of tokens, shrunk and expanded.

A linear layer and a convolution are one: sums go over taps, then blocks of channels. An operand is
a tuple of pointer and strides. Which of its dimensions is dense is a constant, so that the other
strides need not be specialised and one binary reads every place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # UPCAST is for the interpreter, whose product of bf16 is wrong.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def adapter(bank, place):
    # The slot at a place of the table and its true rank; 0 where there is no adapter, and where
    # the slot is no slot of the bank, whose memory is not touched.
    slots_ptr, ranks_ptr, slots, rank = bank
    slot = tl.load(slots_ptr + place).to(tl.int64)
    there = (slot >= 0) & (slot < slots)
    slot = tl.where(there, slot, 0)
    if ranks_ptr is not None:
        rank = tl.minimum(tl.load(ranks_ptr + slot, mask=there, other=0), rank)
    return slot, tl.where(there, rank, 0)


@triton.jit
def survey(bank, row, adapters):
    # How many adapters a row has, and how many of them the bank does not have.
    used = 0
    wrong = 0
    for i in range(adapters):
        slot = tl.load(bank[0] + row * adapters + i).to(tl.int64)
        used += tl.where(slot >= 0, 1, 0)
        wrong += tl.where(slot >= bank[2], 1, 0)
    return used, wrong


@triton.jit
def load_x(
    x,
    window,
    offs_t,
    tokens,
    tap,
    offs_c,
    inputs,
    LINEAR: tl.constexpr,
    X_INSIDE: tl.constexpr,
    KERNEL_W: tl.constexpr,
):
    # (BLOCK_T, BLOCK_K) of what a tap sees; zero outside the image.
    ptr, stride_h, stride_w, stride_c = x
    mask_t = offs_t < tokens
    if LINEAR:
        start = offs_t
        if X_INSIDE:
            start = offs_t * stride_w
    else:
        height, width, out_width, step_h, step_w, pad_h, pad_w, dil_h, dil_w = window
        h = offs_t // out_width * step_h + tap // KERNEL_W * dil_h - pad_h
        w = offs_t % out_width * step_w + tap % KERNEL_W * dil_w - pad_w
        mask_t = mask_t & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        start = h * stride_h + w
        if X_INSIDE:
            start = h * stride_h + w * stride_w
    columns = offs_c.to(tl.int64)
    if not X_INSIDE:
        columns = columns * stride_c
    mask = mask_t[:, None] & (offs_c < inputs)[None, :]
    return tl.load(ptr + start[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def shrink(
    x,
    a,
    h_ptr,
    scales_ptr,
    bank,
    window,
    row,
    start_t,
    span,
    tokens,
    inputs,
    adapters,
    stride_ht,
    part,
    LINEAR: tl.constexpr,
    X_INSIDE: tl.constexpr,
    A_INSIDE: tl.constexpr,
    KERNEL_W: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # h = scale * x A^T of BLOCK_T tokens of a row, for each of its adapters.
    a_ptr, stride_as, stride_ar, stride_ac, stride_at = a
    offs_t = start_t + tl.arange(0, BLOCK_T).to(tl.int64)
    blocks = tl.cdiv(inputs, BLOCK_K)
    first, last = span
    for i in range(adapters):
        slot, rank = adapter(bank, row * adapters + i)
        scale = tl.load(scales_ptr + row * adapters + i)
        for start_r in range(0, rank, BLOCK_R):
            offs_r = start_r + tl.arange(0, BLOCK_R)
            columns = a_ptr + slot * stride_as + offs_r.to(tl.int64)[None, :] * stride_ar
            acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for k in range(first, last):
                tap = 0
                if not LINEAR:
                    tap = k // blocks
                offs_c = (k - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
                tile = load_x(
                    x, window, offs_t, tokens, tap, offs_c, inputs, LINEAR, X_INSIDE, KERNEL_W
                )
                rows = offs_c.to(tl.int64)[:, None]
                if not A_INSIDE:
                    rows = rows * stride_ac
                if not LINEAR:
                    rows += tap * stride_at
                mask = (offs_c < inputs)[:, None] & (offs_r < rank)[None, :]
                down = tl.load(columns + rows, mask=mask, other=0.0)
                acc = dot(tile, down, acc, PRECISION, UPCAST)
            acc *= scale
            place = ((row * adapters + i) * SPLITS + part) * tokens + offs_t
            mask = (offs_t < tokens)[:, None] & (offs_r < rank)[None, :]
            h = h_ptr + place[:, None] * stride_ht + offs_r[None, :]
            tl.store(h, acc.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_h(
    h_ptr,
    place,
    tokens,
    offs_t,
    offs_r,
    rank,
    stride_ht,
    SPLITS: tl.constexpr,
    dtype: tl.constexpr,
):
    # (BLOCK_T, BLOCK_R): the parts of the sum in their order, rounded to the inputs' dtype.
    mask = (offs_t < tokens)[:, None] & (offs_r < rank)[None, :]
    rows = place * SPLITS * tokens + offs_t
    h = tl.load(h_ptr + rows[:, None] * stride_ht + offs_r[None, :], mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        rows += tokens
        h += tl.load(h_ptr + rows[:, None] * stride_ht + offs_r[None, :], mask=mask, other=0.0)
    return h.to(dtype)


@triton.jit
def expand(
    y,
    h_ptr,
    b,
    bank,
    row,
    wrong,
    start_t,
    start_n,
    tokens,
    outputs,
    adapters,
    stride_ht,
    Y_INSIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # y += sum of h B over a row's adapters, for BLOCK_T tokens and BLOCK_N outputs.
    y_ptr, stride_y = y
    b_ptr, stride_bs, stride_br = b
    offs_t = start_t + tl.arange(0, BLOCK_T).to(tl.int64)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask = (offs_t < tokens)[:, None] & (offs_n < outputs)[None, :]
    if Y_INSIDE:
        ptrs = y_ptr + offs_t[:, None] * stride_y + offs_n[None, :]
    else:
        ptrs = y_ptr + offs_t[:, None] + offs_n.to(tl.int64)[None, :] * stride_y
    # Before the products, which need not wait for it.
    base = tl.load(ptrs, mask=mask, other=0.0)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i in range(adapters):
        slot, rank = adapter(bank, row * adapters + i)
        for start_r in tl.range(0, rank, BLOCK_E, num_stages=1):
            offs_r = start_r + tl.arange(0, BLOCK_E)
            h = load_h(
                h_ptr,
                row * adapters + i,
                tokens,
                offs_t,
                offs_r,
                rank,
                stride_ht,
                SPLITS,
                base.dtype,
            )
            rows = b_ptr + slot * stride_bs + offs_r.to(tl.int64)[:, None] * stride_br
            mask_b = (offs_r < rank)[:, None] & (offs_n < outputs)[None, :]
            up = tl.load(rows + offs_n[None, :], mask=mask_b, other=0.0)
            acc = dot(h, up, acc, PRECISION, UPCAST)
    # What is not in the bank shows.
    acc = tl.where(wrong > 0, float("nan"), acc)
    tl.store(ptrs, (base.to(tl.float32) + acc).to(base.dtype), mask=mask)
