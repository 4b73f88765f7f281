"""Fingerprints and noise: integers are Python's, and where an op is specified in float32 operations
each is one NumPy scalar operation, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

_MASK32 = 0xFFFFFFFF

# dtype -> (bits an element has, pattern of +inf, pattern every NaN is read as); None: no NaN
FINGERPRINT_FORMATS: dict[str, tuple[int, int | None, int | None]] = {
    "float16": (16, 0x7C00, 0x7E00),
    "bfloat16": (16, 0x7F80, 0x7FC0),
    "float32": (32, 0x7F800000, 0x7FC00000),
    "float64": (64, 0x7FF0000000000000, 0x7FF8000000000000),
    "int32": (32, None, None),
    "int64": (64, None, None),
    "uint8": (8, None, None),
    "bool": (8, None, None),
}


def fingerprint_key(index: int) -> int:
    """The 64-bit key of a logical index below 2^31; docs/fingerprint.md."""
    a = (2 * index + 1) * 0x9E3779B1 & _MASK32
    a ^= (a >> 15) & ~1
    b = a * 0x85EBCA77 & _MASK32
    b ^= (b >> 16) & ~1
    return (a * b & _MASK32) << 32 | b


def fingerprint_row(patterns: Iterable[int], dtype: str) -> tuple[int, int]:
    """The digest of one row and how many of its elements are not finite.

    Args:
        patterns: the elements' bit patterns, unsigned, in logical order.
        dtype: a key of `FINGERPRINT_FORMATS`.
    """
    width, infinity, quiet_nan = FINGERPRINT_FORMATS[dtype]
    digest = 0
    nonfinite = 0
    for index, bits in enumerate(patterns):
        if infinity is not None and quiet_nan is not None:
            magnitude = bits & ((1 << (width - 1)) - 1)
            nonfinite += magnitude >= infinity
            bits = quiet_nan if magnitude > infinity else bits
        word = bits ^ bits >> 16 ^ bits >> 32 ^ bits >> 48 ^ 0x27D4EB2F
        digest += fingerprint_key(index) * word
    return digest % 2**64, nonfinite


def philox_4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds: four counter words and two key words give four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & _MASK32
        k1 = (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def noise_word(seed: int, purpose: int, step: int, index: int) -> int:
    """The 32-bit word behind element `index` of a row's noise; docs/noise.md."""
    block = index // 4
    counter = (block & _MASK32, block >> 32, step, purpose)
    return philox_4x32_10(counter, (seed & _MASK32, seed >> 32))[index % 4]


def word_to_normal(word: int) -> np.float32:
    """The normal transform of docs/noise.md, an operation at a time."""
    one = np.float32
    signed = word - 2**31
    distance = -1 - signed if signed < 0 else signed
    q = (one(distance) + one(0.5)) * one(2.0**-32)
    y = one(2**31 - 1 - distance) + one(0.5)
    value = _central(q) if q <= one(0.425) else _tail(y)
    return -value if signed < 0 else value


def _polynomial(coefficients: tuple[float, ...], x: np.float32) -> np.float32:
    value = np.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def _central(q: np.float32) -> np.float32:
    r = np.float32(0.180625) - q * q
    num = _polynomial((59.109374720, 159.29113202, 50.434271938, 3.3871327179), r)
    return q * num / _polynomial((67.187563600, 78.757757664, 17.895169469, 1.0), r)


def _tail(y: np.float32) -> np.float32:
    one = np.float32
    bits = int(y.view(np.int32))
    exponent = (bits - 0x3F3504F3) >> 23
    f = np.int32(bits - exponent * 2**23).view(np.float32) - one(1)
    s = f / (f + one(2))
    log = one(32 - exponent) * one(0.6931471805599453) - s * _polynomial(
        (2 / 7, 2 / 5, 2 / 3, 2.0), s * s
    )
    r = np.sqrt(log) - one(1.6)
    num = _polynomial((0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777), r)
    return num / _polynomial((0.12021132975, 0.73700164250, 1.0), r)
