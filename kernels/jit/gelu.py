"""GELU as a device function, for whatever kernel gates or activates with it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """`x * Phi(x)` of fp32, Phi the normal distribution function; its limits at infinity.

    It is `max(x, 0) - a * Q(a)` with a = |x|, Q = 1 - Phi and `Q(a) * exp(a^2/2) = t * poly(t)`,
    t = 1 / (1 + p*a): an exponential, a division and six products, and no cancellation in the
    negative tail. `poly` is the minimax polynomial on a in [0, 13] (6e-8 of Q(a), relative near 0
    and absolute further out).
    """
    a = tl.abs(x)
    # Beyond 13 the product is 0 in effect. A selection, since a minimum would lose NaN.
    a = tl.where(a > 13.0, 13.0, a)
    # 2^(-a^2 log2(e) / 2)
    density = tl.exp2(a * a * -0.72134752044448170)
    t = 1.0 / (a * 0.283935546875 + 1.0)
    ratio = -0.09763465 * t + 0.34012842
    ratio = ratio * t - 0.16455511
    ratio = ratio * t + 0.22000900
    ratio = ratio * t + 0.086349029
    ratio = ratio * t + 0.11570331
    return tl.where(x > 0.0, x, 0.0) - a * density * (ratio * t)
