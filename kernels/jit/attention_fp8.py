"""The bodies of `heatsink.kernels.attention_fp8`: what is quantised, and the product of it."""

from __future__ import annotations

import triton
import triton.language as tl

from heatsink.kernels.jit.attention_tiles import at, dot, load_tile, store_tile

# The largest finite value of e4m3, and its log2.
E4M3_MAX = tl.constexpr(448.0)
E4M3_MAX_LOG2 = tl.constexpr(8.807354922057604)
INT8_MAX = tl.constexpr(127.0)
# Chunks whose sums are read at a time.
GROUP = tl.constexpr(16)


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
            total = tl.maximum(total, tl.max(part, 0))
        else:
            total += tl.sum(part, 0)
    return total


@triton.jit(do_not_specialize=["heads", "chunks", "seq"])
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
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
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
    k = load_tile(k_ptr, stride_kn * UNIT, stride_kd, seq - start, CHUNK, 0, WIDTH, HEAD_DIM, True)
    tl.store(sums_ptr + out, tl.sum(k.to(tl.float32), 0))
    if PURE:
        v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, index // heads, index % heads)
        v_ptr += first * stride_vn * UNIT
        v = load_tile(
            v_ptr, stride_vn * UNIT, stride_vd, seq - start, CHUNK, 0, WIDTH, HEAD_DIM, True
        )
        tl.store(peaks_ptr + out, tl.max(tl.abs(v.to(tl.float32)), 0))


@triton.jit
def _to_e4m3(x, EMULATE: tl.constexpr):
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
        return _to_e4m3(x * (E4M3_MAX / safe), EMULATE), top / E4M3_MAX
    else:
        x = x * (INT8_MAX / safe)
        return (x + tl.where(x < 0.0, -0.5, 0.5)).to(tl.int8), top / INT8_MAX


@triton.jit(do_not_specialize=["heads", "chunks", "seq", "blocks"])
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
    stride_xd,
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
    x = load_tile(x_ptr, stride_xs * UNIT, stride_xd, rows, BLOCK, 0, WIDTH, HEAD_DIM, True)
    x = x.to(tl.float32)
    place = index.to(tl.int64) * blocks + block
    offs = tl.arange(0, BLOCK)
    if KEYS:
        x -= _over_chunks(sums_ptr, index, chunks, WIDTH, False)[None, :] / seq
        x = tl.where(offs[:, None] < rows, x, 0.0)
        top = tl.max(tl.max(tl.abs(x), 1), 0)
        x, unit = _rounded(x, top, PURE, EMULATE)
        tl.store(scale_ptr + place, unit)
    else:
        top = tl.max(tl.abs(x), 1)
        x, unit = _rounded(x, top[:, None], PURE, EMULATE)
        tl.store(scale_ptr + place * BLOCK + offs, tl.max(unit, 1) * factor)
    out_ptr += place * BLOCK * WIDTH
    store_tile(out_ptr, x, WIDTH, BLOCK, BLOCK, 0, WIDTH, WIDTH)


@triton.jit(do_not_specialize=["heads", "chunks", "seq", "blocks"])
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
    stride_vd,
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
    v = load_tile(v_ptr, stride_vn * UNIT, stride_vd, rows, BLOCK, 0, WIDTH, HEAD_DIM, True)
    top = _over_chunks(peaks_ptr, index, chunks, WIDTH, True)
    offs = index.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    if block == 0:
        tl.store(scale_ptr + offs, top / E4M3_MAX)
    v, _ = _rounded(v.to(tl.float32), top[None, :], True, EMULATE)
    offs_n = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
    width = blocks.to(tl.int64) * BLOCK
    tl.store(out_ptr + offs[:, None] * width + offs_n[None, :], tl.trans(v))


@triton.jit
def _dot8(a, b, acc, K: tl.constexpr, PURE: tl.constexpr):
    # The sums of an e4m3 product are short of bits on Hopper: no longer than K, then fp32.
    if PURE:
        return tl.dot(a, b, acc, max_num_imprecise_acc=K)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


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
        p = _to_e4m3(p, EMULATE) if PURE else p.to(v_ptr.dtype.element_ty)
        ptr = v_ptr + start * stride_n
        pad: tl.constexpr = MASKED and not PURE
        width: tl.constexpr = WIDTH if PURE else HEAD_DIM
        acc_a *= alpha[:, None]
        v = load_tile(ptr, stride_n, stride_d, rows, BLOCK_N, 0, HEAD_A, width, pad)
        if PURE:
            acc_a = _dot8(p, v, acc_a, BLOCK_N, PURE)
        else:
            acc_a = dot(p, v, acc_a, "ieee", EMULATE)
        if HEAD_B > 0:
            acc_b *= alpha[:, None]
            v = load_tile(ptr, stride_n, stride_d, rows, BLOCK_N, HEAD_A, HEAD_B, width, pad)
            if PURE:
                acc_b = _dot8(p, v, acc_b, BLOCK_N, PURE)
            else:
                acc_b = dot(p, v, acc_b, "ieee", EMULATE)
    return acc_a, acc_b, m_i, l_i


@triton.jit
def _store_share(
    out_ptr,
    acc,
    l_i,
    v_scale_ptr,
    stride_s,
    rows,
    BLOCK_M: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PURE: tl.constexpr,
):
    acc /= l_i[:, None]
    if PURE:
        acc *= tl.load(v_scale_ptr + FIRST + tl.arange(0, PART))[None, :]
    store_tile(out_ptr, acc, stride_s, rows, BLOCK_M, FIRST, PART, HEAD_DIM)


@triton.jit(do_not_specialize=["heads", "seq_q", "seq_k"])
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
    stride_vd,
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
    q_ptr += row * WIDTH
    q_a = load_tile(q_ptr, WIDTH, 1, BLOCK_M, BLOCK_M, 0, ROW_A, WIDTH, False)
    q_b = q_a
    if ROW_B > 0:
        q_b = load_tile(q_ptr, WIDTH, 1, BLOCK_M, BLOCK_M, ROW_A, ROW_B, WIDTH, False)
    q_scale = tl.load(q_scale_ptr + row + tl.arange(0, BLOCK_M))
    k_ptr += index * blocks_n * BLOCK_N * WIDTH
    k_scale_ptr += index * blocks_n
    batch, head = index // heads, index % heads
    if PURE:
        stride_n, stride_d = 1, blocks_n * BLOCK_N
        v_ptr += index * WIDTH * stride_d
    else:
        stride_n, stride_d = stride_vn * UNIT, stride_vd
        v_ptr = at(v_ptr, stride_vb * UNIT, stride_vh * UNIT, batch, head)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc_a = tl.zeros([BLOCK_M, HEAD_A], tl.float32)
    acc_b = acc_a
    if HEAD_B > 0:
        acc_b = tl.zeros([BLOCK_M, HEAD_B], tl.float32)
    state = (acc_a, acc_b, m_i, l_i)
    queries = (q_a, q_b, q_scale)
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
    _store_share(
        out_ptr, acc_a, l_i, v_scale_ptr, stride_s, rows, BLOCK_M, 0, HEAD_A, HEAD_DIM, PURE
    )
    if HEAD_B > 0:
        _store_share(
            out_ptr,
            acc_b,
            l_i,
            v_scale_ptr,
            stride_s,
            rows,
            BLOCK_M,
            HEAD_A,
            HEAD_B,
            HEAD_DIM,
            PURE,
        )
