"""The body of `heatsink.kernels.fingerprint`; docs/fingerprint.md has the arithmetic.

Integers only, so no sum's order matters: programs add to a row's totals with atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _keys(index):
    """The halves of the keys of uint32 logical indices: high, low."""
    a = (index * 2 + 1) * 0x9E3779B1
    a = a ^ ((a >> 15) & 0xFFFFFFFE)
    b = a * 0x85EBCA77
    b = b ^ ((b >> 16) & 0xFFFFFFFE)
    return a * b, b


@triton.jit
def _unsigned(raw, WIDTH: tl.constexpr):
    """Bit patterns as uint32, or uint64 for those of 64 bits."""
    if WIDTH == 64:
        return raw.to(tl.uint64, bitcast=True)
    elif WIDTH == 32:
        return raw.to(tl.uint32, bitcast=True)
    elif WIDTH == 16:
        return raw.to(tl.uint16, bitcast=True).to(tl.uint32)
    else:
        return raw.to(tl.uint32)


@triton.jit
def _as_float(magnitude, FORMAT: tl.constexpr):
    """The bits of fp32 magnitudes; they are ordered as the magnitudes are."""
    if FORMAT == "fp32":
        return magnitude.to(tl.int32, bitcast=True)
    elif FORMAT == "bf16":
        return (magnitude << 16).to(tl.int32, bitcast=True)
    elif FORMAT == "fp16":
        half = magnitude.to(tl.uint16).to(tl.float16, bitcast=True)
        return half.to(tl.float32).to(tl.int32, bitcast=True)
    elif FORMAT == "fp64":
        return magnitude.to(tl.float64, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    else:
        return magnitude.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _fingerprint_kernel(
    x_ptr,
    digest_ptr,
    nonfinite_ptr,
    absmax_ptr,
    rows,
    count,
    tiles,
    channels,
    stride_xr,
    FORMAT: tl.constexpr,
    INFINITY: tl.constexpr,
    QUIET_NAN: tl.constexpr,
    CHANNELS_INSIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    # A program reads STEPS blocks of ROWS rows, whose keys are the same. `x` comes as integers.
    WIDTH: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    WORD: tl.constexpr = tl.uint64 if WIDTH == 64 else tl.uint32
    tile = tl.program_id(0).to(tl.int64) % tiles
    offs_r = tl.program_id(0).to(tl.int64) // tiles * ROWS + tl.arange(0, ROWS)
    mask_r = offs_r < rows
    digest = tl.zeros((ROWS, BLOCK), tl.uint64)
    high_part = tl.zeros((ROWS, BLOCK), tl.uint32)
    nonfinite = tl.zeros((ROWS, BLOCK), tl.int32)
    largest = tl.zeros((ROWS, BLOCK), WORD)
    for step in range(STEPS):
        offs = (tile * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        mask = mask_r[:, None] & (offs < count)[None, :]
        index = offs.to(tl.uint32)
        if CHANNELS_INSIDE:
            inner = channels.to(tl.uint32)
            pixels = count.to(tl.uint32) // inner
            index = (index % inner) * pixels + index // inner
        high, low = _keys(index)

        raw = tl.load(x_ptr + offs_r[:, None] * stride_xr + offs[None, :], mask=mask, other=0)
        bits = _unsigned(raw, WIDTH)
        magnitude = bits
        if INFINITY > 0:
            magnitude = bits & ((1 << (WIDTH - 1)) - 1)
            bits = tl.where(magnitude > INFINITY, QUIET_NAN, bits).to(WORD)
            nonfinite += (magnitude >= INFINITY).to(tl.int32)
            magnitude = tl.where(magnitude >= INFINITY, 0, magnitude).to(WORD)
        elif FORMAT == "int":
            magnitude = tl.where(raw < 0, 0 - bits, bits).to(WORD)
        largest = tl.maximum(largest, magnitude)

        word = bits
        if WIDTH == 64:
            word = word ^ (word >> 32)
        word = tl.where(mask, word ^ (word >> 16) ^ 0x27D4EB2F, 0).to(WORD)
        if WIDTH == 64:
            digest += ((high.to(tl.uint64) << 32) | low.to(tl.uint64))[None, :] * word
        else:
            digest += low.to(tl.uint64)[None, :] * word.to(tl.uint64)
            high_part += high[None, :] * word

    digest += high_part.to(tl.uint64) << 32
    total = tl.sum(digest.to(tl.int64, bitcast=True), axis=1)
    tl.atomic_add(digest_ptr + offs_r, total, mask=mask_r, sem="relaxed")
    if INFINITY > 0:
        found = tl.sum(nonfinite, axis=1).to(tl.int64)
        tl.atomic_add(nonfinite_ptr + offs_r, found, mask=mask_r, sem="relaxed")
    absmax = _as_float(tl.max(largest, axis=1), FORMAT)
    tl.atomic_max(absmax_ptr + offs_r, absmax, mask=mask_r, sem="relaxed")
