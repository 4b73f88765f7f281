"""The body of `heatsink.kernels.attention` for any number of keys, block by block."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.attention_tiles import (
    at,
    biased,
    dot,
    load_head,
    load_tile,
    store_head,
    weights,
    zero_head,
)


@triton.jit
def _describe(ptr, sizes, strides, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # A TMA descriptor of (batch, head, token, column), whatever the order in memory.
    batches, heads, rows, columns = sizes
    stride_b, stride_h, stride_s = strides
    return tl.make_tensor_descriptor(
        ptr,
        shape=[batches, heads, rows, columns],
        strides=[stride_b, stride_h, stride_s, 1],
        block_shape=[1, 1, ROWS, WIDTH],
    )


@triton.jit
def _describe_both(
    k,
    v,
    sizes,
    BLOCK_N: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
):
    # Descriptors of K's and V's parts: K first, each with its second part after it.
    k_ptr, k_strides = k[0], (k[1], k[2], k[3])
    v_ptr, v_strides = v[0], (v[1], v[2], v[3])
    desc_k = _describe(k_ptr, sizes, k_strides, BLOCK_N, HEAD_A)
    desc_v = _describe(v_ptr, sizes, v_strides, BLOCK_N, HEAD_A)
    if HEAD_B > 0:
        desc_kb = _describe(k_ptr, sizes, k_strides, BLOCK_N, HEAD_B)
        desc_vb = _describe(v_ptr, sizes, v_strides, BLOCK_N, HEAD_B)
        return desc_k, desc_kb, desc_v, desc_vb
    else:
        return desc_k, None, desc_v, None


@triton.jit
def _load_keys(
    source,
    desc,
    start,
    rows,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,
):
    # BLOCK_N tokens of K or V from `start` on, through a descriptor where there is one.
    ptr, stride_s, batch, head = source
    if desc is not None:
        tile = desc.load([batch, head, start, FIRST]).reshape(BLOCK_N, WIDTH)
    else:
        ptr += tl.cast(start, tl.int64) * stride_s
        rows -= start
        tile = load_tile(ptr, stride_s, 1, rows, BLOCK_N, FIRST, WIDTH, HEAD_DIM, MASKED)
    return tile


@triton.jit
def _attend(
    state,
    queries,
    keys,
    values,
    bias,
    descs,
    span,
    offs_m,
    seq_q,
    seq_k,
    scale,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # The keys of a span for a block of queries, the softmax rescaled block by block.
    acc_a, acc_b, m_i, l_i = state
    first, last = span
    for start in range(first, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = _load_keys(keys, descs[0], start, seq_k, BLOCK_N, 0, HEAD_A, HEAD_DIM, MASKED)
        qk = tl.zeros([m_i.shape[0], BLOCK_N], tl.float32)
        qk = dot(queries[0], tl.trans(k), qk, PRECISION, UPCAST)
        if HEAD_B > 0:
            k = _load_keys(keys, descs[1], start, seq_k, BLOCK_N, HEAD_A, HEAD_B, HEAD_DIM, MASKED)
            qk = dot(queries[1], tl.trans(k), qk, PRECISION, UPCAST)
        if HAS_BIAS:
            qk = biased(qk, bias, offs_m, offs_n, seq_q, seq_k, scale, MASKED)
        if MASKED:
            qk = tl.where(offs_n[None, :] < seq_k, qk, float("-inf"))
            if CAUSAL:
                qk = tl.where(offs_n[None, :] <= offs_m[:, None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        p = weights(qk, m_new[:, None], scale, HAS_BIAS)
        alpha = weights(m_i, m_new, scale, HAS_BIAS)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        v = _load_keys(values, descs[2], start, seq_k, BLOCK_N, 0, HEAD_A, HEAD_DIM, MASKED)
        p = p.to(v.dtype)
        acc_a = dot(p, v, acc_a * alpha[:, None], PRECISION, UPCAST)
        if HEAD_B > 0:
            v = _load_keys(
                values, descs[3], start, seq_k, BLOCK_N, HEAD_A, HEAD_B, HEAD_DIM, MASKED
            )
            acc_b = dot(p, v, acc_b * alpha[:, None], PRECISION, UPCAST)
    return acc_a, acc_b, m_i, l_i


@triton.jit
def _block(
    tile,
    q,
    k,
    v,
    bias,
    out_ptr,
    descs,
    heads,
    seq_q,
    seq_k,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # One block of queries of one head: numbered along the queries, then heads, then samples.
    blocks = tl.cdiv(seq_q, BLOCK_M)
    start_m = (tile % blocks) * BLOCK_M
    head = tile // blocks % heads
    batch = tile // blocks // heads
    rows = seq_q - start_m
    start_m = tl.cast(start_m, tl.int64)
    q_ptr = at(q[0], q[1], q[2], batch, head) + start_m * q[3]
    queries = load_head(q_ptr, q[3], rows, BLOCK_M, HEAD_DIM, HEAD_A, HEAD_B)
    keys = (at(k[0], k[1], k[2], batch, head), k[3], batch, head)
    values = (at(v[0], v[1], v[2], batch, head), v[3], batch, head)
    if HAS_BIAS:
        bias = (at(bias[0], bias[1], bias[2], batch, head), bias[3])
    offs_m = start_m + tl.arange(0, BLOCK_M)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_a, acc_b = zero_head(BLOCK_M, HEAD_A, HEAD_B)
    state = (acc_a, acc_b, m_i, l_i)
    # Blocks whose every key every query sees need no mask.
    whole = seq_k // BLOCK_N * BLOCK_N
    last = seq_k
    if CAUSAL:
        whole = tl.minimum(whole, (start_m + 1).to(tl.int32) // BLOCK_N * BLOCK_N)
        last = tl.minimum(seq_k, start_m.to(tl.int32) + BLOCK_M)
    state = _attend(
        state,
        queries,
        keys,
        values,
        bias,
        descs,
        (0, whole),
        offs_m,
        seq_q,
        seq_k,
        scale,
        BLOCK_N,
        HEAD_DIM,
        HEAD_A,
        HEAD_B,
        CAUSAL,
        False,
        HAS_BIAS,
        PRECISION,
        UPCAST,
    )
    if CAUSAL or RAGGED:
        state = _attend(
            state,
            queries,
            keys,
            values,
            bias,
            descs,
            (whole, last),
            offs_m,
            seq_q,
            seq_k,
            scale,
            BLOCK_N,
            HEAD_DIM,
            HEAD_A,
            HEAD_B,
            CAUSAL,
            True,
            HAS_BIAS,
            PRECISION,
            UPCAST,
        )
    acc_a, acc_b, m_i, l_i = state

    width = heads * HEAD_DIM
    out_ptr += (tl.cast(batch, tl.int64) * seq_q + start_m) * width + head * HEAD_DIM
    store_head(out_ptr, acc_a, acc_b, l_i, width, rows, BLOCK_M, HEAD_DIM, HEAD_A, HEAD_B, HAS_BIAS)


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
        "batches",
    ]
)
def _attention_kernel(
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
    batches,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS_UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    q = (q_ptr, stride_qb * UNIT, stride_qh * UNIT, stride_qm * UNIT)
    k = (k_ptr, stride_kb * UNIT, stride_kh * UNIT, stride_kn * UNIT)
    v = (v_ptr, stride_vb * UNIT, stride_vh * UNIT, stride_vn * UNIT)
    bias = None
    if HAS_BIAS:
        bias = (bias_ptr, stride_bb * BIAS_UNIT, stride_bh * BIAS_UNIT, stride_bm * BIAS_UNIT)
    descs = (None, None, None, None)
    if TMA:
        descs = _describe_both(k, v, (batches, heads, seq_k, HEAD_DIM), BLOCK_N, HEAD_A, HEAD_B)
    if PROGRAMS > 0:
        tiles = tl.cdiv(seq_q, BLOCK_M) * heads * batches
        for tile in range(tl.program_id(0), tiles, PROGRAMS):
            _block(
                tile,
                q,
                k,
                v,
                bias,
                out_ptr,
                descs,
                heads,
                seq_q,
                seq_k,
                scale,
                BLOCK_M,
                BLOCK_N,
                HEAD_DIM,
                HEAD_A,
                HEAD_B,
                HAS_BIAS,
                CAUSAL,
                RAGGED,
                PRECISION,
                UPCAST,
            )
    else:
        _block(
            tl.program_id(0),
            q,
            k,
            v,
            bias,
            out_ptr,
            descs,
            heads,
            seq_q,
            seq_k,
            scale,
            BLOCK_M,
            BLOCK_N,
            HEAD_DIM,
            HEAD_A,
            HEAD_B,
            HAS_BIAS,
            CAUSAL,
            RAGGED,
            PRECISION,
            UPCAST,
        )
