"""Gated activations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def silu_mul(gate: Array, up: Array) -> Array:
    """`silu(gate) * up`, float64 of any shape."""
    gate = gate.astype(np.float64)
    out: Array = gate / (1.0 + np.exp(-gate)) * up.astype(np.float64)
    return out
