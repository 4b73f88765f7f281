"""Normalisations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def group_norm_silu(
    x: Array,
    groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
) -> Array:
    """`(N, C, ...)` normalised by groups of channels, modulated per sample, then SiLU."""
    samples, channels = x.shape[:2]
    if x.size == 0:
        return np.zeros(x.shape)
    grouped = x.astype(np.float64).reshape(samples, groups, -1)
    mean = grouped.mean(axis=2, keepdims=True)
    variance = ((grouped - mean) ** 2).mean(axis=2, keepdims=True)
    y: Array = ((grouped - mean) / np.sqrt(variance + eps)).reshape(samples, channels, -1)
    y = y * (1.0 if weight is None else weight[:, None]) + (0.0 if bias is None else bias[:, None])
    y = y * (1.0 if scale is None else 1.0 + scale[:, :, None])
    y = (y + (0.0 if shift is None else shift[:, :, None])).reshape(x.shape)
    return y / (1.0 + np.exp(-y)) if silu else y


def layer_norm(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
) -> Array:
    """`(..., C)` normalised over the last dimension, then modulated per sample."""
    x = x.astype(np.float64)
    if x.size == 0:
        return x
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    y: Array = (x - mean) / np.sqrt(variance + eps)
    y = y * (1.0 if weight is None else weight) + (0.0 if bias is None else bias)
    per_sample = (x.shape[0], *(1 for _ in x.shape[2:]), x.shape[-1])
    y = y * (1.0 if scale is None else 1.0 + scale.reshape(per_sample))
    return y + (0.0 if shift is None else shift.reshape(per_sample))


def rms_norm(x: Array, weight: Array | None = None, *, eps: float = 1e-6) -> Array:
    """`(..., C)` divided by the root of its mean square over the last dimension."""
    x = x.astype(np.float64)
    if x.size == 0:
        return x
    y: Array = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight
