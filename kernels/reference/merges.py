"""Merging low-rank adapters into weights in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def lora_merge(
    base: Array, terms: Sequence[tuple[Array, Array, float, Array | None, int, int]]
) -> Array:
    """`W0 (1 + sum_i (g_i - 1)) + sum_i g_i s_i B_i A_i` of one weight, float64 of its shape.

    Args:
        base: the weight, its rows along the first dimension.
        terms: of each `a (rank, ...)`, `b (count, rank)`, the scale, the magnitude or None, the
            first row and the step from row to row.
    """
    rows = base.astype(np.float64).reshape(base.shape[0], -1)
    factor = np.ones(len(rows))
    delta = np.zeros(rows.shape)
    for a, b, scale, magnitude, row, step in terms:
        part = scale * (b.astype(np.float64) @ a.astype(np.float64).reshape(len(a), -1))
        for i in range(len(b)):
            j = row + i * step
            gain = 1.0 if magnitude is None else magnitude[i] / np.linalg.norm(rows[j] + part[i])
            factor[j] += gain - 1.0
            delta[j] += gain * part[i]
    out: Array = (rows * factor[:, None] + delta).reshape(base.shape)
    return out
