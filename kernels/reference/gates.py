"""Gated activations in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def silu_mul(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, float64 of any shape."""
    gate = gate.astype(np.float64)
    out: Array = gate / (1.0 + np.exp(-gate)) * up.astype(np.float64)
    return out


def geglu(x: Array) -> Array:
    """`hidden * gelu(gate)` of float64 `(..., 2 W)`: hidden first, gate second."""
    hidden, gate = np.split(x.astype(np.float64), 2, axis=-1)
    # erfc, so that nothing cancels in the negative tail.
    tail = np.array([math.erfc(-value / math.sqrt(2)) for value in gate.flat])
    out: Array = hidden * gate * 0.5 * tail.reshape(gate.shape)
    return out
