"""What the bodies of `heatsink.kernels.attention` share: tiles of a head, products, weights.

A head's columns are a power of two, A, and where it pays a smaller second one, B, so that a head of
80 columns is worked on as 64 + 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(
    ptr,
    stride_s,
    stride_d,
    rows,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    # Columns FIRST to FIRST + WIDTH of ROWS tokens; zero from token `rows` and HEAD_DIM on.
    offs_s = tl.arange(0, ROWS).to(tl.int64)
    offs_d = FIRST + tl.arange(0, WIDTH).to(tl.int64)
    ptrs = ptr + offs_s[:, None] * stride_s + offs_d[None, :] * stride_d
    mask_d = offs_d[None, :] < HEAD_DIM
    if MASKED and HEAD_DIM < FIRST + WIDTH:
        tile = tl.load(ptrs, mask=(offs_s[:, None] < rows) & mask_d, other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=offs_s[:, None] < rows, other=0.0)
    elif HEAD_DIM < FIRST + WIDTH:
        tile = tl.load(ptrs, mask=mask_d, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    ptr,
    tile,
    stride_s,
    rows,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    offs_s = tl.arange(0, ROWS).to(tl.int64)
    offs_d = FIRST + tl.arange(0, WIDTH)
    mask = (offs_s[:, None] < rows) & (offs_d[None, :] < HEAD_DIM)
    ptrs = ptr + offs_s[:, None] * stride_s + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_head(
    ptr,
    stride_s,
    rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
):
    # Both parts of ROWS tokens of a head, zero from token `rows` on.
    tile_a = load_tile(ptr, stride_s, 1, rows, ROWS, 0, HEAD_A, HEAD_DIM, True)
    tile_b = tile_a
    if HEAD_B > 0:
        tile_b = load_tile(ptr, stride_s, 1, rows, ROWS, HEAD_A, HEAD_B, HEAD_DIM, True)
    return tile_a, tile_b


@triton.jit
def zero_head(ROWS: tl.constexpr, HEAD_A: tl.constexpr, HEAD_B: tl.constexpr):
    # Both parts of a sum over values.
    acc_a = tl.zeros([ROWS, HEAD_A], tl.float32)
    acc_b = acc_a
    if HEAD_B > 0:
        acc_b = tl.zeros([ROWS, HEAD_B], tl.float32)
    return acc_a, acc_b


@triton.jit
def store_head(
    ptr,
    acc_a,
    acc_b,
    l_i,
    stride_s,
    rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    # The weighted means of both parts, from the sums of weighted values and of weights.
    acc_a = share(acc_a, l_i, HAS_BIAS)
    store_tile(ptr, acc_a, stride_s, rows, ROWS, 0, HEAD_A, HEAD_DIM)
    if HEAD_B > 0:
        acc_b = share(acc_b, l_i, HAS_BIAS)
        store_tile(ptr, acc_b, stride_s, rows, ROWS, HEAD_A, HEAD_B, HEAD_DIM)


@triton.jit
def at(ptr, stride_b, stride_h, batch, head):
    # Where a head of a sample begins.
    return ptr + tl.cast(batch, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # UPCAST is for the interpreter, whose product of bf16 is wrong.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def biased(qk, bias, offs_m, offs_n, seq_q, seq_k, scale, MASKED: tl.constexpr):
    # Natural units, so that a bias of the dtype's lowest value stays finite. Where all keys are
    # there, no mask along them hinders wide loads.
    ptr, stride_m = bias
    mask = offs_m[:, None] < seq_q
    if MASKED:
        mask = mask & (offs_n[None, :] < seq_k)
    offs = offs_m.to(tl.int64)[:, None] * stride_m + offs_n.to(tl.int64)[None, :]
    return qk * scale + tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def weights(scores, m_i, scale, HAS_BIAS: tl.constexpr):
    # exp(score - maximum), with log2(e) in the scale where there is no bias. With one a whole row
    # may be -inf, and then its weights are 0.
    if HAS_BIAS:
        return tl.exp2((scores - tl.where(m_i == float("-inf"), 0.0, m_i)) * LOG2_E)
    else:
        return tl.exp2(scores * scale - m_i * scale)


@triton.jit
def share(acc, l_i, HAS_BIAS: tl.constexpr):
    # The weighted mean; 0 for a row without any key.
    if HAS_BIAS:
        l_i = tl.where(l_i == 0.0, 1.0, l_i)
    return acc / l_i[:, None]
