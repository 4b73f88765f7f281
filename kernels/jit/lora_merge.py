"""The body of `heatsink.kernels.lora_merge`: all weights in one launch, from tables of addresses.

The tables are int64; `heatsink.kernels._merge_tables` makes them and says what they hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of a row of the tables; kernels/_merge_tables.py has the same.
WEIGHT_FIELDS = tl.constexpr(8)
TERM_FIELDS = tl.constexpr(16)
# What is even begins at multiples of so many values: told by rounding, which changes nothing.
EVEN = tl.constexpr(16)
# A strip is weight, block of rows and block of columns, of this many bits the last two.
STRIP_BITS = tl.constexpr(21)
STRIP_MASK = tl.constexpr((1 << 21) - 1)


@triton.jit
def _even_pointer(address, DTYPE: tl.constexpr):
    # The rounding is for a value of its own, since others may be odd.
    return tl.multiple_of((address // EVEN * EVEN).to(tl.pointer_type(DTYPE)), EVEN)


@triton.jit
def _load_any(address, dtype, offsets, mask):
    # Values of the dtype that the number says (0 fp16, 1 bf16, 2 fp32), as fp32.
    if dtype == 0:
        x = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask, other=0.0)
        x = x.to(tl.float32)
    elif dtype == 1:
        x = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask, other=0.0)
        x = x.to(tl.float32)
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask, other=0.0)
    return x


@triton.jit
def _bytes(dtype):
    return tl.where(dtype == 2, 4, 2).to(tl.int64)


@triton.jit
def _sum_alike(
    term,
    place,
    mask_m,
    start_n,
    columns,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K,
    UPCAST: tl.constexpr,
):
    # B A, both of one 16-bit dtype, A's columns even and in the weight's order.
    rank = tl.load(term + 4).to(tl.int32)
    columns = columns // EVEN * EVEN
    a_ptr = _even_pointer(tl.load(term), DTYPE) + start_n
    b_ptr = tl.load(term + 1).to(tl.pointer_type(DTYPE))
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns - start_n
    acc = tl.zeros([place.shape[0], BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_K):
        mask_k = offs_k < rank - start
        b = b_ptr + (place[:, None] * rank + offs_k[None, :])
        b = tl.load(b, mask_m[:, None] & mask_k[None, :], other=0.0)
        a = a_ptr + (offs_k[:, None] * columns + offs_n[None, :])
        a = tl.load(a, mask_k[:, None] & mask_n[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(b, a, acc)
        a_ptr += BLOCK_K * columns.to(tl.int64)
        b_ptr += BLOCK_K
    return acc


@triton.jit
def _sum_mixed(term, place, mask_m, start_n, columns, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    # B A of any dtypes; A's columns may be in another order than the weight's.
    a, b = tl.load(term), tl.load(term + 1)
    rank = tl.load(term + 4).to(tl.int32)
    dtype_a, dtype_b = tl.load(term + 9), tl.load(term + 10)
    inner, pixels = tl.load(term + 11).to(tl.int32), tl.load(term + 12).to(tl.int32)
    offs_k = tl.arange(0, BLOCK_K)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < columns
    source = offs_n % inner * pixels + offs_n // inner
    acc = tl.zeros([place.shape[0], BLOCK_N], tl.float32)
    for start in range(0, rank, BLOCK_K):
        mask_k = offs_k < rank - start
        at = place[:, None] * rank + offs_k[None, :]
        left = _load_any(b, dtype_b, at, mask_m[:, None] & mask_k[None, :])
        at = offs_k[:, None] * columns + source[None, :]
        right = _load_any(a, dtype_a, at, mask_k[:, None] & mask_n[None, :])
        acc = tl.dot(left, right, acc, input_precision="tf32x3")
        a += BLOCK_K * columns.to(tl.int64) * _bytes(dtype_a)
        b += BLOCK_K * _bytes(dtype_b)
    return acc


@triton.jit
def _product(
    term,
    place,
    mask_m,
    start_n,
    columns,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K,
    UPCAST,
):
    # scale B A of a term, for the rows `place` of B.
    if FORM == "fp16":
        acc = _sum_alike(
            term, place, mask_m, start_n, columns, tl.float16, BLOCK_N, BLOCK_K, UPCAST
        )
    elif FORM == "bf16":
        acc = _sum_alike(
            term, place, mask_m, start_n, columns, tl.bfloat16, BLOCK_N, BLOCK_K, UPCAST
        )
    else:
        acc = _sum_mixed(term, place, mask_m, start_n, columns, BLOCK_N, BLOCK_K)
    return acc * tl.load(term + 13).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _places(term, offs_m, rows):
    # Which rows of B the weight's rows are, and whether they are any.
    row, step = tl.load(term + 5).to(tl.int32), tl.load(term + 6).to(tl.int32)
    distance = offs_m - row
    place = distance // step
    mask = (distance >= 0) & (place * step == distance) & (offs_m < rows)
    return place, mask & (place < tl.load(term + 7).to(tl.int32))


@triton.jit
def _tile(address, start_n, rows, columns, DTYPE, EVEN_ROWS, BLOCK_M: tl.constexpr, BLOCK_N):
    # Pointers and mask of a block of rows, of which the address is given, from a column on.
    if EVEN_ROWS:
        ptr = _even_pointer(address, DTYPE)
        columns = columns // EVEN * EVEN
    else:
        ptr = address.to(tl.pointer_type(DTYPE))
    offs_m, offs_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < rows) & (offs_n < columns - start_n)
    return ptr + start_n + (offs_m * columns + offs_n), mask


@triton.jit
def _find_gains(
    weight,
    terms_ptr,
    gains_ptr,
    tile,
    first_m,
    DTYPE,
    EVEN_ROWS,
    FORM,
    BLOCK_M: tl.constexpr,
    BLOCK_N,
    BLOCK_K,
    UPCAST,
):
    # Each row's 1 + sum of (gain - 1); the gains themselves go to gains_ptr.
    rows, columns = tl.load(weight + 2).to(tl.int32), tl.load(weight + 3).to(tl.int32)
    offs_m = first_m + tl.arange(0, BLOCK_M)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    for t in range(tl.load(weight + 4), tl.load(weight + 5)):
        term = terms_ptr + t * TERM_FIELDS
        magnitude = tl.load(term + 2)
        if magnitude != 0:
            place, mask_m = _places(term, offs_m, rows)
            squares = tl.zeros([BLOCK_M], tl.float32)
            for start in range(0, columns, BLOCK_N):
                x = _product(term, place, mask_m, start, columns, FORM, BLOCK_N, BLOCK_K, UPCAST)
                ptr, mask = _tile(
                    tile, start, rows - first_m, columns, DTYPE, EVEN_ROWS, BLOCK_M, BLOCK_N
                )
                x += tl.load(ptr, mask, other=0.0).to(tl.float32)
                squares += tl.sum(x * x, 1)
            length = _load_any(magnitude, tl.load(term + 14), place, mask_m)
            gain = length / tl.sqrt(tl.where(mask_m, squares, 1.0))
            factor += tl.where(mask_m, gain - 1.0, 0.0)
            tl.store(gains_ptr + tl.load(term + 3) + place, gain, mask_m)
    return factor


@triton.jit
def _lora_merge_kernel(
    weights_ptr,
    terms_ptr,
    strips_ptr,
    gains_ptr,
    DTYPE: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    FORM: tl.constexpr,
    GAINS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    KIND: tl.constexpr = (
        tl.float16 if DTYPE == "fp16" else (tl.bfloat16 if DTYPE == "bf16" else tl.float32)
    )
    BYTES: tl.constexpr = 4 if DTYPE == "fp32" else 2
    strip = tl.load(strips_ptr + tl.program_id(0).to(tl.int64))
    weight = weights_ptr + (strip >> STRIP_BITS >> STRIP_BITS) * WEIGHT_FIELDS
    rows, columns = tl.load(weight + 2).to(tl.int32), tl.load(weight + 3).to(tl.int32)
    block_m = strip >> STRIP_BITS & STRIP_MASK
    first_m = block_m.to(tl.int32) * BLOCK_M
    skipped = block_m * BLOCK_M * tl.load(weight + 3) * BYTES
    base, out = tl.load(weight) + skipped, tl.load(weight + 1) + skipped
    first = (strip & STRIP_MASK).to(tl.int32) * COLUMNS
    last = tl.minimum(first + COLUMNS, columns)
    factor = tl.full([BLOCK_M], 1.0, tl.float32)
    if GAINS:
        # The strip has whole rows, for their norms.
        last = columns
        factor = _find_gains(
            weight,
            terms_ptr,
            gains_ptr,
            base,
            first_m,
            KIND,
            EVEN_ROWS,
            FORM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            UPCAST,
        )
        # Other threads of the program read the gains.
        tl.debug_barrier()
    offs_m = first_m + tl.arange(0, BLOCK_M)
    for start in range(first, last, BLOCK_N):
        ptr, mask = _tile(base, start, rows - first_m, columns, KIND, EVEN_ROWS, BLOCK_M, BLOCK_N)
        pristine = tl.load(ptr, mask, other=0.0)
        delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        touched = offs_m < 0
        for t in range(tl.load(weight + 4), tl.load(weight + 5)):
            term = terms_ptr + t * TERM_FIELDS
            place, mask_m = _places(term, offs_m, rows)
            part = _product(term, place, mask_m, start, columns, FORM, BLOCK_N, BLOCK_K, UPCAST)
            if GAINS:  # noqa: SIM102 - known when this is compiled, the other is not
                if tl.load(term + 2) != 0:
                    gain = tl.load(gains_ptr + tl.load(term + 3) + place, mask_m, other=0.0)
                    part = part * gain[:, None]
            delta += part
            touched = touched | mask_m
        merged = (pristine.to(tl.float32) * factor[:, None] + delta).to(KIND)
        merged = tl.where(touched[:, None], merged, pristine)
        ptr, mask = _tile(out, start, rows - first_m, columns, KIND, EVEN_ROWS, BLOCK_M, BLOCK_N)
        tl.store(ptr, merged, mask)
