"""The body of `heatsink.kernels.attention` for few keys: all of them at once, as two parts.

K and V are loaded once by a program and serve several blocks of queries; nothing is rescaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.attention_tiles import (
    at,
    biased,
    dot,
    load_head,
    store_head,
    weights,
    zero_head,
)


@triton.jit
def _scores(
    queries,
    keys,
    bias,
    offs_m,
    seq_q,
    seq_k,
    scale,
    FIRST_N: tl.constexpr,
    PART_N: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_n = FIRST_N + tl.arange(0, PART_N)
    qk = tl.zeros([offs_m.shape[0], PART_N], tl.float32)
    qk = dot(queries[0], tl.trans(keys[0]), qk, PRECISION, UPCAST)
    if HEAD_B > 0:
        qk = dot(queries[1], tl.trans(keys[1]), qk, PRECISION, UPCAST)
    if HAS_BIAS:
        qk = biased(qk, bias, offs_m, offs_n, seq_q, seq_k, scale, True)
    qk = tl.where(offs_n[None, :] < seq_k, qk, float("-inf"))
    if CAUSAL:
        qk = tl.where(offs_n[None, :] <= offs_m[:, None], qk, float("-inf"))
    return qk


@triton.jit
def _attend(
    queries,
    k_first,
    k_second,
    v_first,
    v_second,
    bias,
    offs_m,
    seq_q,
    seq_k,
    scale,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Sums of weighted values and of weights for a block of queries, over both parts of the keys.
    s_a = _scores(
        queries,
        k_first,
        bias,
        offs_m,
        seq_q,
        seq_k,
        scale,
        0,
        KEYS_A,
        HEAD_B,
        HAS_BIAS,
        CAUSAL,
        PRECISION,
        UPCAST,
    )
    m_i = tl.max(s_a, 1)
    if KEYS_B > 0:
        s_b = _scores(
            queries,
            k_second,
            bias,
            offs_m,
            seq_q,
            seq_k,
            scale,
            KEYS_A,
            KEYS_B,
            HEAD_B,
            HAS_BIAS,
            CAUSAL,
            PRECISION,
            UPCAST,
        )
        m_i = tl.maximum(m_i, tl.max(s_b, 1))
    acc_a, acc_b = zero_head(offs_m.shape[0], HEAD_A, HEAD_B)
    p = weights(s_a, m_i[:, None], scale, HAS_BIAS)
    l_i = tl.sum(p, 1)
    p = p.to(v_first[0].dtype)
    acc_a = dot(p, v_first[0], acc_a, PRECISION, UPCAST)
    if HEAD_B > 0:
        acc_b = dot(p, v_first[1], acc_b, PRECISION, UPCAST)
    if KEYS_B > 0:
        p = weights(s_b, m_i[:, None], scale, HAS_BIAS)
        l_i += tl.sum(p, 1)
        p = p.to(v_first[0].dtype)
        acc_a = dot(p, v_second[0], acc_a, PRECISION, UPCAST)
        if HEAD_B > 0:
            acc_b = dot(p, v_second[1], acc_b, PRECISION, UPCAST)
    return acc_a, acc_b, l_i


@triton.jit(
    do_not_specialize=[
        "heads",
        "seq_q",
        "seq_k",
        "stride_qb",
        "stride_qh",
        "stride_qm",
        "stride_kb",
        "stride_kh",
        "stride_kn",
        "stride_vb",
        "stride_vh",
        "stride_vn",
        "stride_bb",
        "stride_bh",
        "stride_bm",
    ]
)
def _attention_whole_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    out_ptr,
    heads,
    seq_q,
    seq_k,
    scale,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    stride_bm,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    blocks = tl.cdiv(seq_q, BLOCK_M)
    groups = tl.cdiv(blocks, BLOCKS)
    tile = tl.program_id(0)
    first = tile % groups * BLOCKS
    head = tile // groups % heads
    batch = tile // groups // heads
    k_ptr = at(k_ptr, stride_kb * UNIT, stride_kh * UNIT, batch, head)
    v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, batch, head)
    stride_kn *= UNIT
    stride_vn *= UNIT
    k_first = load_head(k_ptr, stride_kn, seq_k, KEYS_A, HEAD_DIM, HEAD_A, HEAD_B)
    v_first = load_head(v_ptr, stride_vn, seq_k, KEYS_A, HEAD_DIM, HEAD_A, HEAD_B)
    k_second, v_second = k_first, v_first
    if KEYS_B > 0:
        rows = seq_k - KEYS_A
        k_ptr += tl.cast(KEYS_A, tl.int64) * stride_kn
        v_ptr += tl.cast(KEYS_A, tl.int64) * stride_vn
        k_second = load_head(k_ptr, stride_kn, rows, KEYS_B, HEAD_DIM, HEAD_A, HEAD_B)
        v_second = load_head(v_ptr, stride_vn, rows, KEYS_B, HEAD_DIM, HEAD_A, HEAD_B)
    bias = None
    if HAS_BIAS:
        bias_ptr = at(bias_ptr, stride_bb * BIAS_UNIT, stride_bh * BIAS_UNIT, batch, head)
        bias = (bias_ptr, stride_bm * BIAS_UNIT)
    q_ptr = at(q_ptr, stride_qb * UNIT, stride_qh * UNIT, batch, head)
    width = heads * HEAD_DIM
    out_ptr = at(out_ptr, seq_q.to(tl.int64) * width, HEAD_DIM, batch, head)

    for block in range(first, tl.minimum(first + BLOCKS, blocks)):
        start_m = tl.cast(block, tl.int64) * BLOCK_M
        rows = seq_q - block * BLOCK_M
        ptr = q_ptr + start_m * stride_qm * UNIT
        queries = load_head(ptr, stride_qm * UNIT, rows, BLOCK_M, HEAD_DIM, HEAD_A, HEAD_B)
        acc_a, acc_b, l_i = _attend(
            queries,
            k_first,
            k_second,
            v_first,
            v_second,
            bias,
            block * BLOCK_M + tl.arange(0, BLOCK_M),
            seq_q,
            seq_k,
            scale,
            KEYS_A,
            KEYS_B,
            HEAD_A,
            HEAD_B,
            HAS_BIAS,
            CAUSAL,
            PRECISION,
            UPCAST,
        )
        ptr = out_ptr + start_m * width
        store_head(ptr, acc_a, acc_b, l_i, width, rows, BLOCK_M, HEAD_DIM, HEAD_A, HEAD_B, HAS_BIAS)
