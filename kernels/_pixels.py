"""Images with channels innermost, and GroupNorm on them in PyTorch operations.

The PyTorch implementation serves where there is neither a compiler nor Triton. It takes its sums in
the order of `csrc/group_norm_tile.h`, operation by operation, so both give the same bits: a chunk's
even pixels, its odd ones, both together; every fourth channel of a group, those four together; the
chunks in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels._silu import silu as ieee_silu

# As in csrc/group_norm.cpp: values of a chunk, about, and its pixels, at least.
_CHUNK = 8192
_MIN_PIXELS = 8

Moments = tuple[Tensor, Tensor, int]


def as_pixels(x: Tensor) -> Tensor:
    """`(N, C, ...)` as `(N, P, C)` with dense channels; a copy only where it must be."""
    pixels = x.movedim(1, -1).flatten(1, -2)
    return pixels if pixels.stride(-1) == 1 or pixels.shape[-1] == 1 else pixels.contiguous()


def empty_like_pixels(x: Tensor) -> Tensor:
    """An output of the shape of `(N, C, ...)` with channels innermost in memory."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    return torch.empty(shape, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _sum_pixels(x: Tensor) -> Tensor:
    """`(N, K, P, C)` -> `(N, K, C)`."""
    parts = [torch.zeros_like(x[:, :, 0]), torch.zeros_like(x[:, :, 0])]
    for p in range(x.shape[2]):
        parts[p % 2] = parts[p % 2] + x[:, :, p]
    return parts[0] + parts[1]


def _sum_groups(x: Tensor, groups: int) -> Tensor:
    """`(N, K, C)` -> `(N, K, G)`."""
    x = x.unflatten(-1, (groups, -1))
    parts = [torch.zeros_like(x[..., 0]) for _ in range(4)]
    for j in range(x.shape[-1]):
        parts[j % 4] = parts[j % 4] + x[..., j]
    return (parts[0] + parts[2]) + (parts[1] + parts[3])


def _moments(x: Tensor, groups: int) -> Moments:
    """Mean and sum of squared distances `(N, K, G)` of chunks `(N, K, P, C)`, and their size."""
    size = x.shape[-1] // groups
    count = x.shape[2] * size
    mean = _sum_groups(_sum_pixels(x), groups) / float(count)
    distance = x - mean.repeat_interleave(size, dim=-1)[:, :, None]
    return mean, _sum_groups(_sum_pixels(distance * distance), groups), count


def _merge(parts: list[Moments], eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), `(N, G)` float32: Chan's merging, in float64."""
    mean = torch.zeros_like(parts[0][0][:, 0], dtype=torch.float64)
    m2 = torch.zeros_like(mean)
    count = 0.0
    for means, m2s, added in parts:
        for k in range(means.shape[1]):
            distance = means[:, k].double() - mean
            share = added / (count + added)
            mean = mean + distance * share
            m2 = m2 + (m2s[:, k].double() + distance * distance * (count * share))
            count += added
    return mean.float(), (1.0 / torch.sqrt(m2 / count + eps)).float()


def group_norm_torch(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """`heatsink::group_norm_silu` in PyTorch operations."""
    out = empty_like_pixels(x)
    if x.numel() == 0:
        return out
    pixels = as_pixels(x).float()
    count, channels = pixels.shape[1:]
    chunk = max(_MIN_PIXELS, _CHUNK // channels)
    whole = count - count % chunk
    pieces = (pixels[:, :whole].unflatten(1, (-1, chunk)), pixels[:, None, whole:])
    parts = [_moments(piece, groups) for piece in pieces if piece.shape[1] * piece.shape[2] > 0]
    mean, gain = (row.repeat_interleave(channels // groups, dim=-1) for row in _merge(parts, eps))
    if weight is not None:
        gain = gain * weight.float()
    offset = torch.zeros_like(gain) if bias is None else bias.float().expand_as(gain)
    if scale is not None:
        gain = gain * (1.0 + scale.float())
        offset = offset * (1.0 + scale.float())
    if shift is not None:
        offset = offset + shift.float()
    y = (pixels - mean[:, None]) * gain[:, None] + offset[:, None]
    as_pixels(out).copy_(ieee_silu(y) if silu else y)
    return out
