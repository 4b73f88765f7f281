"""The noise of docs/noise.md as device functions, and the body of `heatsink::normal`.

Every kernel that calls these must be compiled without contraction (`Kernel(fusion=False)`): each
operation below is rounded by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 counters and keys of one shape: four uint32 words."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _minus_log(y):
    """-ln(y / 2^32) of fp32 `y` in [0.5, 2^31]."""
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    series = ((z * 0.2857142857142857 + 0.4) * z + 0.6666666666666666) * z + 2.0
    return (32 - exponent).to(tl.float32) * 0.6931471805599453 - s * series


@triton.jit
def words_to_normal(words):
    """The normal transform of uint32 words, fp32."""
    signed = (words ^ 0x80000000).to(tl.int32, bitcast=True)
    distance = signed ^ (signed >> 31)
    q = (distance.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    r = 0.180625 - q * q
    num = ((r * 59.109374720 + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    den = ((r * 67.187563600 + 78.757757664) * r + 17.895169469) * r + 1.0
    inner = tl.div_rn(q * num, den)
    y = (0x7FFFFFFF - distance).to(tl.float32) + 0.5
    t = tl.sqrt_rn(_minus_log(y)) - 1.6
    num = ((t * 0.17023821103 + 1.3067284816) * t + 2.7568153900) * t + 1.4234372777
    den = (t * 0.12021132975 + 0.73700164250) * t + 1.0
    magnitude = tl.where(q <= 0.425, inner, tl.div_rn(num, den))
    return tl.where(signed < 0, -magnitude, magnitude)


@triton.jit
def normals(key, step, purpose, first, BLOCK: tl.constexpr):
    """`4 * BLOCK` values of a row in logical order, from the Philox block `first` on.

    `key` is the seed's int64 bits; `step` and `purpose` hold unsigned 32-bit numbers.
    """
    block = first + tl.arange(0, BLOCK).to(tl.int64)
    c0 = block.to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2 = tl.zeros((BLOCK,), tl.uint32) + step.to(tl.uint32)
    c3 = tl.zeros((BLOCK,), tl.uint32) + purpose.to(tl.uint32)
    k0 = tl.zeros((BLOCK,), tl.uint32) + key.to(tl.uint32)
    k1 = tl.zeros((BLOCK,), tl.uint32) + (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    # A block's words lie side by side: word 2j + k at (block, j, k).
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return words_to_normal(tl.reshape(words, (4 * BLOCK,)))


@triton.jit(do_not_specialize=["purpose", "tiles"])
def _normal_kernel(
    keys_ptr,
    steps_ptr,
    out_ptr,
    purpose,
    count,
    tiles,
    stride_k,
    stride_s,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0).to(tl.int64) % tiles
    key = tl.load(keys_ptr + row * stride_k)
    step = tl.load(steps_ptr + row * stride_s)
    value = normals(key, step, purpose, tile * BLOCK, BLOCK)
    offs = tile * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * count + offs, value, mask=offs < count)
