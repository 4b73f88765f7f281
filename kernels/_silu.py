"""SiLU in IEEE float32 operations: the same bits here and in `csrc/vector_math.h`.

PyTorch's own has other bits in a loop's scalar tail than in its vector body, so that an element's
bits depend on layout and threads. Here no operation is anything but an addition, multiplication or
division, each rounded once, or an integer's.

    silu(x) = x / (1 + 2^t),  t = -x * log2(e),  2^t = 2^n * (p + q) / (p - q)
            = x * ((p - q) / ((p - q) + 2^n * (p + q)))

with n the nearest integer to t, f = t - n, p = C2 f^2 + C0 and q = f (f^2 + C1), minimax to 1e-8
on [-1/2, 1/2]. The result is within 3e-7 * max(1, |silu(x)|) for x of magnitude up to 1e28.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MINUS_LOG2_E = float.fromhex("-0x1.715476p+0")
# Adding it rounds to an integer, which is in the low bits of the sum.
_ROUND = 1.5 * 2.0**23
# Between them 2^n (p + q) is a normal number.
_LOWEST = -126.0
_HIGHEST = 118.0
_C0 = float.fromhex("0x1.68e014p+8")
_C1 = float.fromhex("0x1.f44788p+6")
_C2 = float.fromhex("0x1.155816p+4")


def silu(x: Tensor) -> Tensor:
    """`x / (1 + exp(-x))` of float32, float32 of the same shape."""
    t = (x * _MINUS_LOG2_E).clamp(_LOWEST, _HIGHEST)
    shifted = t + _ROUND
    f = t - (shifted - _ROUND)
    square = f * f
    even = square * _C2 + _C0
    odd = f * (square + _C1)
    below = even - odd
    power = (even + odd).view(torch.int32) + (shifted.view(torch.int32) << 23)
    return x * (below / (below + power.view(torch.float32)))
