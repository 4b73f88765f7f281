"""Tensors as rows of their last dimension, and sums over rows in PyTorch operations.

The sums are taken in the order of `csrc/row_norm.h`, operation by operation, so that both give the
same bits: element i goes to lane i mod 64, in order of i; then lane j takes lane j + 32, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels._checks import check_eps
from heatsink.kernels._launch import ALIGNMENT

# Values of a row that fit in a program's registers.
MAX_WIDTH = 16384

_LANES = 64


def check_rows(x: Tensor, eps: float) -> int:
    """The rows' width.

    Raises:
        TypeError: if `eps` is no number.
        ValueError: unless rows of `x` can be normalised in registers and `eps` is positive.
    """
    shape = x.shape
    if not shape:
        raise ValueError("x: expected (..., C), got a tensor without dimensions")
    width = shape[-1]
    if width > MAX_WIDTH:
        raise ValueError(f"x: expected a last dimension up to {MAX_WIDTH}, got {width}")
    check_eps(eps)
    return width


def power_of_two(count: int) -> int:
    """The least power of two that is `count` or more."""
    return 1 << max(0, count - 1).bit_length()


def settled(x: Tensor) -> Tensor:
    """`x`, or a copy, so that its strides and address let a kernel be specialised in one way only.

    Triton chooses how many elements a thread loads, and with that the order of sums, by what is
    divisible by 16. Sums must not depend on where in memory a sample lies or how far from others,
    so only two forms are let through: dense, and everything divisible.
    """
    plain = [1]
    for size in reversed(x.shape[1:]):
        plain.insert(0, plain[0] * size)
    # The stride of a dimension of size 1 means nothing.
    strides = [
        p if size == 1 else stride
        for size, stride, p in zip(x.shape, x.stride(), plain, strict=True)
    ]
    even = all(number % ALIGNMENT == 0 for number in (x.shape[-1], *strides[:-1]))
    if x.data_ptr() % ALIGNMENT == 0 and strides[-1] == 1 and (strides == plain or even):
        return x.as_strided(x.shape, strides)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def settled_or_none(x: Tensor | None) -> Tensor | None:
    """`settled` of a parameter that may be left out."""
    return None if x is None else settled(x)


def as_grid(x: Tensor) -> Tensor:
    """`(..., C)` as `(outer, inner, C)` with dense last dimension: a view if two strides do.

    So neither a packed projection nor its heads need a copy: `(B, S, H, D)` out of
    `(B, S, 3, H, D)` is `(B S, H, D)`.
    """
    width = x.shape[-1]
    if width > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    merged: list[list[int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = [merged[-1][0] * size, stride]
        else:
            merged.append([size, stride])
    if len(merged) > 2:
        return x.reshape(1, -1, width)
    while len(merged) < 2:
        merged.insert(0, [1, 0])
    (outer, stride_o), (inner, stride_i) = merged
    return x.as_strided((outer, inner, width), (stride_o, stride_i, 1))


def settled_grid(x: Tensor) -> Tensor:
    """`(..., C)` as `(outer, inner, C)` of which `settled` holds, however many rows there are."""
    grid = settled(as_grid(x))
    if not grid.is_contiguous():
        return grid
    rows, width = grid.shape[0] * grid.shape[1], grid.shape[2]
    return grid.as_strided((1, rows, width), (0, width, 1))


def sum_rows(x: Tensor) -> Tensor:
    """`(rows, C)` float32 -> `(rows, 1)`, in the specified order."""
    rows, width = x.shape
    padded = torch.nn.functional.pad(x, (0, -width % _LANES)).view(rows, -1, _LANES)
    lanes = torch.zeros(rows, _LANES, device=x.device)
    for k in range(padded.shape[1]):
        lanes = lanes + padded[:, k]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes


def inverse_root(squares: Tensor, width: int, eps: float) -> Tensor:
    """`1 / sqrt(squares / width + eps)`, in float64 and rounded once."""
    return (1.0 / torch.sqrt(squares.double() / float(width) + eps)).float()
