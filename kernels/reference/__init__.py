"""What each op computes, written as plainly as it can be, to check the fast ones against.

Integer and bit-specified ops are in `exact`; float ops are in NumPy's float64, an op a function,
with the same arguments as the op. Nothing here is optimised or imports PyTorch or Triton.
"""

from heatsink.kernels.reference.attention import attention
from heatsink.kernels.reference.exact import (
    FINGERPRINT_FORMATS,
    fingerprint_key,
    fingerprint_row,
    noise_word,
    philox_4x32_10,
    word_to_normal,
)
from heatsink.kernels.reference.gates import silu_mul

__all__ = [
    "FINGERPRINT_FORMATS",
    "attention",
    "fingerprint_key",
    "fingerprint_row",
    "noise_word",
    "philox_4x32_10",
    "silu_mul",
    "word_to_normal",
]
