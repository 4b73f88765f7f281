"""exp in IEEE float32 operations: the same bits here and in `csrc/exp.h`, on every processor.

PyTorch's own has other bits in a loop's scalar tail than in its vector body, so that an element's
bits depend on layout and threads. Here only additions, multiplications (each rounded once, none
contracted) and integer operations occur:

    n = round(x * log2(e))          by adding 1.5 * 2^23, so to nearest even
    r = x - n * ln(2)               ln(2) in two parts; the product with the first is exact
    e^x = (1 + (r + r^2 * series(r))) * 2^n

`series` is the minimax polynomial of degree 4 for (e^r - 1 - r) / r^2, weighted by r^2 / e^r, on
[-ln(2)/2, ln(2)/2]. The error is below 1 unit in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG2_E = float.fromhex("0x1.715476p+0")
# 15 bits of ln(2), so that times n (8 bits) is exact; and the rest.
_LN2_HIGH = float.fromhex("0x1.62e4p-1")
_LN2_LOW = float.fromhex("0x1.7f7d1cp-20")
# Beyond these e^x is 0 and infinity; within, n fits the two factors below.
_LOWEST = -104.0
_HIGHEST = 89.0
# 1.5 * 2^23 + 254: the sum's low bits hold n plus twice the bias of an exponent.
_SHIFT = 12583166.0
# Highest power first.
_SERIES = tuple(
    float.fromhex(value)
    for value in ("0x1.6a2446p-10", "0x1.1239e2p-7", "0x1.5558f2p-5", "0x1.555492p-3")
)
_SERIES_END = float.fromhex("0x1.fffffcp-2")


def exp(x: Tensor) -> Tensor:
    """e^x of float32, float32 of the same shape: 0, subnormal, inf and NaN where they are due."""
    x = x.clamp(_LOWEST, _HIGHEST)
    shifted = x * LOG2_E + _SHIFT
    n = shifted - _SHIFT
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    series = torch.full_like(r, _SERIES[0])
    for coefficient in (*_SERIES[1:], _SERIES_END):
        series = series * r + coefficient
    fraction = (series * (r * r) + r) + 1.0
    bits = shifted.view(torch.int32)
    half = bits >> 1
    return fraction * (half << 23).view(torch.float32) * ((bits - half) << 23).view(torch.float32)
