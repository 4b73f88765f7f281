"""Adapters by row in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Pair = tuple[int, int]


def _convolve(x: Array, weight: Array, stride: Pair, padding: Pair, dilation: Pair) -> Array:
    """`(in, H, W)` with `(out, in, kh, kw)` -> `(out, H', W')`."""
    (pad_h, pad_w), (step_h, step_w) = padding, stride
    padded = np.pad(x, ((0, 0), (pad_h, pad_h), (pad_w, pad_w)))
    kernel_h, kernel_w = weight.shape[2:]
    high = (padded.shape[1] - dilation[0] * (kernel_h - 1) - 1) // step_h + 1
    wide = (padded.shape[2] - dilation[1] * (kernel_w - 1) - 1) // step_w + 1
    out = np.zeros((weight.shape[0], high, wide))
    for i in range(kernel_h):
        for j in range(kernel_w):
            top, left = i * dilation[0], j * dilation[1]
            seen = padded[
                :,
                top : top + step_h * (high - 1) + 1 : step_h,
                left : left + step_w * (wide - 1) + 1 : step_w,
            ]
            out += np.tensordot(weight[:, :, i, j], seen, axes=(1, 0))
    return out


def lora_rows(
    y: Array,
    x: Array,
    a: Array,
    b: Array,
    slots: Sequence[Sequence[int]],
    scales: Array,
    *,
    ranks: Sequence[int] | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Array:
    """`y` with every row's adapters added, float64, of y's shape."""
    out = y.astype(np.float64).copy()
    for row, chosen in enumerate(slots):
        for place, slot in enumerate(chosen):
            if slot < 0:
                continue
            rank = a.shape[1] if ranks is None else ranks[slot]
            down, up = a[slot, :rank].astype(np.float64), b[slot, :rank].astype(np.float64)
            scale = float(scales[row, place])
            if a.ndim == 3:
                out[row] += scale * (x[row].astype(np.float64) @ down.T @ up)
            else:
                h = _convolve(x[row].astype(np.float64), down, stride, padding, dilation)
                out[row] += scale * np.tensordot(up, h, axes=(0, 0))
    return out
