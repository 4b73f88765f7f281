"""What each op computes, written as plainly as it can be, to check the fast ones against.

Integer and bit-specified ops are in `exact`; float ops are in NumPy's float64, an op a function,
with the same arguments as the op. Nothing here is optimised or imports PyTorch or Triton.
"""

from heatsink.kernels.reference.adapters import lora_rows
from heatsink.kernels.reference.attention import attention
from heatsink.kernels.reference.exact import (
    FINGERPRINT_FORMATS,
    fingerprint_key,
    fingerprint_row,
    noise_word,
    philox_4x32_10,
    word_to_normal,
)
from heatsink.kernels.reference.gates import (
    geglu,
    silu_mul,
)
from heatsink.kernels.reference.merges import (
    lora_merge,
)
from heatsink.kernels.reference.norms import (
    group_norm_silu,
    layer_norm,
    rms_norm,
)
from heatsink.kernels.reference.positions import (
    rotary,
)
from heatsink.kernels.reference.products import (
    conv2d,
    linear,
    lora_linear,
)
from heatsink.kernels.reference.steps import (
    guided_step,
)

__all__ = [
    "FINGERPRINT_FORMATS",
    "attention",
    "conv2d",
    "fingerprint_key",
    "fingerprint_row",
    "geglu",
    "group_norm_silu",
    "guided_step",
    "layer_norm",
    "linear",
    "lora_linear",
    "lora_merge",
    "lora_rows",
    "noise_word",
    "philox_4x32_10",
    "rms_norm",
    "rotary",
    "silu_mul",
    "word_to_normal",
]
