"""Products with their epilogues in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from heatsink.kernels.reference.adapters import lora_rows

Array = npt.NDArray[Any]


def _gelu(x: Array) -> Array:
    # erfc, so that nothing cancels in the negative tail.
    tail = np.array([math.erfc(-value / math.sqrt(2)) for value in x.flat])
    out: Array = 0.5 * x * tail.reshape(x.shape)
    return out


def _activate(x: Array, activation: str) -> Array:
    if activation == "geglu":
        value, gate = np.split(x, 2, axis=-1)
        return value * _gelu(gate)
    if activation == "gelu":
        return _gelu(x)
    scale = {
        "silu": x,
        "quick_gelu": 1.702 * x,
        "gelu_tanh": 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3),
    }
    with np.errstate(over="ignore"):
        return x if not activation else x / (1.0 + np.exp(-scale[activation]))


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    residual: Array | None = None,
    sample_add: Array | None = None,
    activation: str = "",
) -> Array:
    """`act(x W^T + bias + sample_add) + residual` of float64 `(..., K)`."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias
    if sample_add is not None:
        y = y + sample_add.reshape(len(x), *[1] * (x.ndim - 2), -1)
    y = _activate(y, activation)
    return y if residual is None else y + residual


def lora_linear(
    x: Array,
    weight: Array,
    bias: Array | None,
    a: Array,
    b: Array,
    slots: Sequence[Sequence[int]],
    scales: Array,
    *,
    ranks: Sequence[int] | None = None,
    residual: Array | None = None,
    sample_add: Array | None = None,
    activation: str = "",
) -> Array:
    """`act(x W^T + bias + sample_add + terms) + residual` of float64 `(R, ..., K)`."""
    y = linear(x, weight, bias, sample_add=sample_add)
    y = _activate(lora_rows(y, x, a, b, slots, scales, ranks=ranks), activation)
    return y if residual is None else y + residual


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    x2: Array | None = None,
    residual: Array | None = None,
    sample_add: Array | None = None,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    activation: str = "",
) -> Array:
    """The convolution of float64 `(B, C, H, W)`, as the sum of its taps' products."""
    seen = x if x2 is None else np.concatenate([x, x2], axis=1)
    seen = seen.repeat(upsample, axis=2).repeat(upsample, axis=3)
    edge = (padding, padding)
    seen = np.pad(seen, ((0, 0), (0, 0), edge, edge)).transpose(0, 2, 3, 1)
    height, width = weight.shape[2:]
    rows = (seen.shape[1] - height) // stride + 1
    columns = (seen.shape[2] - width) // stride + 1
    taps = [
        seen[:, ky : ky + stride * rows : stride, kx : kx + stride * columns : stride][
            :, :rows, :columns
        ]
        for ky in range(height)
        for kx in range(width)
    ]
    flat = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    after = None if residual is None else residual.transpose(0, 2, 3, 1)
    out = linear(
        np.concatenate(taps, axis=-1),
        flat,
        bias,
        residual=after,
        sample_add=sample_add,
        activation=activation,
    )
    return out.transpose(0, 3, 1, 2)
