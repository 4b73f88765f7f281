"""Position embeddings in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rotary(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array:
    """Each pair of channels of `(B, S, H, D)` turned by its angle, float64."""
    half = x.shape[-1] // 2
    first = slice(0, None, 2) if interleaved else slice(0, half)
    second = slice(1, None, 2) if interleaved else slice(half, None)
    a, b = x[..., first].astype(np.float64), x[..., second].astype(np.float64)
    cos, sin = cos[..., None, :], sin[..., None, :]
    out: Array = np.empty(x.shape, dtype=np.float64)
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    return out
