"""The body of `heatsink.kernels.attention_fp8`: the products of what is quantised."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.attention_fp8_quantise import to_e4m3
from heatsink.kernels.jit.attention_tiles import at, dot, load_tile, store_tile, zero_head

# log2 of the largest finite value of e4m3.
E4M3_MAX_LOG2 = tl.constexpr(8.807354922057604)


@triton.jit
def _dot8(a, b, acc, K: tl.constexpr, PURE: tl.constexpr):
    # The sums of an e4m3 product are short of bits on Hopper: no longer than K, then fp32.
    if PURE:
        return tl.dot(a, b, acc, max_num_imprecise_acc=K)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def _weigh(p, v, acc, K: tl.constexpr, PURE: tl.constexpr, EMULATE: tl.constexpr):
    if PURE:
        return _dot8(p, v, acc, K, PURE)
    else:
        return dot(p, v, acc, "ieee", EMULATE)


@triton.jit
def _attend(
    state,
    queries,
    keys,
    values,
    first,
    last,
    seq_k,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_A: tl.constexpr,
    ROW_B: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    PURE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    # Blocks `first` to `last` of keys for a block of queries; scores are in units of log2.
    acc_a, acc_b, m_i, l_i = state
    q_a, q_b, q_scale = queries
    k_ptr, k_scale_ptr = keys
    v_ptr, stride_n, stride_d = values
    for block in range(first, last):
        start = tl.cast(block, tl.int64) * BLOCK_N
        ptr = k_ptr + start * WIDTH
        qk = tl.zeros([m_i.shape[0], BLOCK_N], tl.float32 if PURE else tl.int32)
        k = load_tile(ptr, WIDTH, 1, BLOCK_N, BLOCK_N, 0, ROW_A, WIDTH, False)
        qk = _dot8(q_a, tl.trans(k), qk, ROW_A, PURE)
        if ROW_B > 0:
            k = load_tile(ptr, WIDTH, 1, BLOCK_N, BLOCK_N, ROW_A, ROW_B, WIDTH, False)
            qk = _dot8(q_b, tl.trans(k), qk, ROW_B, PURE)
        scores = qk.to(tl.float32) * (q_scale * tl.load(k_scale_ptr + block))[:, None]
        rows = seq_k - block * BLOCK_N
        if MASKED:
            scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < rows, scores, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(scores, 1))
        # Weights up to the largest e4m3; the factor cancels in the weighted mean.
        base = m_new - E4M3_MAX_LOG2 if PURE else m_new
        p = tl.exp2(scores - base[:, None])
        alpha = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * alpha + tl.sum(p, 1)
        p = to_e4m3(p, EMULATE) if PURE else p.to(v_ptr.dtype.element_ty)
        ptr = v_ptr + start * stride_n
        pad: tl.constexpr = MASKED and not PURE
        width: tl.constexpr = WIDTH if PURE else HEAD_DIM
        acc_a *= alpha[:, None]
        v = load_tile(ptr, stride_n, stride_d, rows, BLOCK_N, 0, HEAD_A, width, pad)
        acc_a = _weigh(p, v, acc_a, BLOCK_N, PURE, EMULATE)
        if HEAD_B > 0:
            acc_b *= alpha[:, None]
            v = load_tile(ptr, stride_n, stride_d, rows, BLOCK_N, HEAD_A, HEAD_B, width, pad)
            acc_b = _weigh(p, v, acc_b, BLOCK_N, PURE, EMULATE)
    return acc_a, acc_b, m_i, l_i


@triton.jit
def _load_queries(
    q_ptr,
    q_scale_ptr,
    row,
    BLOCK_M: tl.constexpr,
    ROW_A: tl.constexpr,
    ROW_B: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Both parts of BLOCK_M quantised queries, and their scales.
    q_ptr += row * WIDTH
    q_a = load_tile(q_ptr, WIDTH, 1, BLOCK_M, BLOCK_M, 0, ROW_A, WIDTH, False)
    q_b = q_a
    if ROW_B > 0:
        q_b = load_tile(q_ptr, WIDTH, 1, BLOCK_M, BLOCK_M, ROW_A, ROW_B, WIDTH, False)
    return q_a, q_b, tl.load(q_scale_ptr + row + tl.arange(0, BLOCK_M))


@triton.jit
def _store_share(
    place,
    acc,
    l_i,
    BLOCK_M: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PURE: tl.constexpr,
):
    out_ptr, v_scale_ptr, stride_s, rows = place
    acc /= l_i[:, None]
    if PURE:
        acc *= tl.load(v_scale_ptr + FIRST + tl.arange(0, PART))[None, :]
    store_tile(out_ptr, acc, stride_s, rows, BLOCK_M, FIRST, PART, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "heads",
        "seq_q",
        "seq_k",
        "stride_vb",
        "stride_vh",
        "stride_vn",
    ]
)
def _attention_fp8_kernel(
    q_ptr,
    q_scale_ptr,
    k_ptr,
    k_scale_ptr,
    v_ptr,
    v_scale_ptr,
    out_ptr,
    heads,
    seq_q,
    seq_k,
    stride_vb,
    stride_vh,
    stride_vn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROW_A: tl.constexpr,
    ROW_B: tl.constexpr,
    HEAD_A: tl.constexpr,
    HEAD_B: tl.constexpr,
    WIDTH: tl.constexpr,
    RAGGED: tl.constexpr,
    PURE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    blocks_m = tl.cdiv(seq_q, BLOCK_M)
    blocks_n = tl.cdiv(seq_k, BLOCK_N)
    block = tl.program_id(0) % blocks_m
    index = (tl.program_id(0) // blocks_m).to(tl.int64)
    row = index * blocks_m * BLOCK_M + block * BLOCK_M
    queries = _load_queries(q_ptr, q_scale_ptr, row, BLOCK_M, ROW_A, ROW_B, WIDTH)
    k_ptr += index * blocks_n * BLOCK_N * WIDTH
    k_scale_ptr += index * blocks_n
    batch, head = index // heads, index % heads
    if PURE:
        stride_n, stride_d = 1, blocks_n * BLOCK_N
        v_ptr += index * WIDTH * stride_d
    else:
        stride_n, stride_d = stride_vn * UNIT, 1
        v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, batch, head)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_a, acc_b = zero_head(BLOCK_M, HEAD_A, HEAD_B)
    state = (acc_a, acc_b, m_i, l_i)
    keys = (k_ptr, k_scale_ptr)
    values = (v_ptr, stride_n, stride_d)
    whole = seq_k // BLOCK_N
    state = _attend(
        state,
        queries,
        keys,
        values,
        0,
        whole,
        seq_k,
        BLOCK_N,
        HEAD_DIM,
        ROW_A,
        ROW_B,
        HEAD_A,
        HEAD_B,
        WIDTH,
        False,
        PURE,
        EMULATE,
    )
    if RAGGED:
        state = _attend(
            state,
            queries,
            keys,
            values,
            whole,
            blocks_n,
            seq_k,
            BLOCK_N,
            HEAD_DIM,
            ROW_A,
            ROW_B,
            HEAD_A,
            HEAD_B,
            WIDTH,
            True,
            PURE,
            EMULATE,
        )
    acc_a, acc_b, m_i, l_i = state

    rows = seq_q - block * BLOCK_M
    stride_s = heads * HEAD_DIM
    out_ptr += (batch * seq_q + block * BLOCK_M) * stride_s + head * HEAD_DIM
    if PURE:
        v_scale_ptr += index * WIDTH
    place = (out_ptr, v_scale_ptr, stride_s, rows)
    _store_share(place, acc_a, l_i, BLOCK_M, 0, HEAD_A, HEAD_DIM, PURE)
    if HEAD_B > 0:
        _store_share(place, acc_b, l_i, BLOCK_M, HEAD_A, HEAD_B, HEAD_DIM, PURE)
