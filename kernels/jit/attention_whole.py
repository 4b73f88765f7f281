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
    load_tile,
    share,
    store_tile,
    weights,
)


@triton.jit
def _load_part(
    source,
    seq_k,
    FIRST_N: tl.constexpr,
    PART_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
):
    # PART_N tokens from FIRST_N on; both parts of the head.
    ptr, stride_s, stride_d = source
    ptr += tl.cast(FIRST_N, tl.int64) * stride_s
    rows = seq_k - FIRST_N
    tile_a = load_tile(ptr, stride_s, stride_d, rows, PART_N, 0, HEAD_A, HEAD_DIM, True)
    tile_b = tile_a
    if HEAD_B > 0:
        tile_b = load_tile(ptr, stride_s, stride_d, rows, PART_N, HEAD_A, HEAD_B, HEAD_DIM, True)
    return tile_a, tile_b


@triton.jit
def _scores(
    q_a,
    q_b,
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
    qk = tl.zeros([q_a.shape[0], PART_N], tl.float32)
    qk = dot(q_a, tl.trans(keys[0]), qk, PRECISION, UPCAST)
    if HEAD_B > 0:
        qk = dot(q_b, tl.trans(keys[1]), qk, PRECISION, UPCAST)
    if HAS_BIAS:
        qk = biased(qk, bias, offs_m, offs_n, seq_q, seq_k, scale)
    qk = tl.where(offs_n[None, :] < seq_k, qk, float("-inf"))
    if CAUSAL:
        qk = tl.where(offs_n[None, :] <= offs_m[:, None], qk, float("-inf"))
    return qk


@triton.jit(do_not_specialize=["heads", "seq_q", "seq_k"])
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
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    UNIT: tl.constexpr,
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
    k = (at(k_ptr, stride_kb * UNIT, stride_kh * UNIT, batch, head), stride_kn * UNIT, stride_kd)
    v = (at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, batch, head), stride_vn * UNIT, stride_vd)
    bias = (bias_ptr, stride_bm, stride_bn)
    if HAS_BIAS:
        bias = (at(bias_ptr, stride_bb, stride_bh, batch, head), stride_bm, stride_bn)
    k_first = _load_part(k, seq_k, 0, KEYS_A, HEAD_DIM, HEAD_A, HEAD_B)
    v_first = _load_part(v, seq_k, 0, KEYS_A, HEAD_DIM, HEAD_A, HEAD_B)
    if KEYS_B > 0:
        k_second = _load_part(k, seq_k, KEYS_A, KEYS_B, HEAD_DIM, HEAD_A, HEAD_B)
        v_second = _load_part(v, seq_k, KEYS_A, KEYS_B, HEAD_DIM, HEAD_A, HEAD_B)
    q_ptr = at(q_ptr, stride_qb * UNIT, stride_qh * UNIT, batch, head)
    width = heads * HEAD_DIM
    out_ptr = at(out_ptr, seq_q.to(tl.int64) * width, HEAD_DIM, batch, head)

    for block in range(first, tl.minimum(first + BLOCKS, blocks)):
        start_m = tl.cast(block, tl.int64) * BLOCK_M
        rows = seq_q - block * BLOCK_M
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        ptr = q_ptr + start_m * stride_qm * UNIT
        q_a = load_tile(ptr, stride_qm * UNIT, stride_qd, rows, BLOCK_M, 0, HEAD_A, HEAD_DIM, True)
        q_b = q_a
        if HEAD_B > 0:
            q_b = load_tile(
                ptr, stride_qm * UNIT, stride_qd, rows, BLOCK_M, HEAD_A, HEAD_B, HEAD_DIM, True
            )
        s_a = _scores(
            q_a,
            q_b,
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
                q_a,
                q_b,
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
        p = weights(s_a, m_i[:, None], scale, HAS_BIAS)
        l_i = tl.sum(p, 1)
        p = p.to(v_ptr.dtype.element_ty)
        acc_a = dot(p, v_first[0], tl.zeros([BLOCK_M, HEAD_A], tl.float32), PRECISION, UPCAST)
        if HEAD_B > 0:
            acc_b = dot(p, v_first[1], tl.zeros([BLOCK_M, HEAD_B], tl.float32), PRECISION, UPCAST)
        if KEYS_B > 0:
            p = weights(s_b, m_i[:, None], scale, HAS_BIAS)
            l_i += tl.sum(p, 1)
            p = p.to(v_ptr.dtype.element_ty)
            acc_a = dot(p, v_second[0], acc_a, PRECISION, UPCAST)
            if HEAD_B > 0:
                acc_b = dot(p, v_second[1], acc_b, PRECISION, UPCAST)
        ptr = out_ptr + start_m * width
        acc_a = share(acc_a, l_i, HAS_BIAS)
        store_tile(ptr, acc_a, width, rows, BLOCK_M, 0, HEAD_A, HEAD_DIM)
        if HEAD_B > 0:
            acc_b = share(acc_b, l_i, HAS_BIAS)
            store_tile(ptr, acc_b, width, rows, BLOCK_M, HEAD_A, HEAD_B, HEAD_DIM)
