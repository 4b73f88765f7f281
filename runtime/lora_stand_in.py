"""Stands in for `heatsink.kernels.lora_merge` and `lora_rows` until they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's effect on rows `row + i * step` of weight number `weight`."""

    weight: int
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    row: int = 0
    step: int = 1


def lora_merge(base: Sequence[Tensor], out: Sequence[Tensor], terms: Sequence[Term]) -> None:
    """`out[j]` = `base[j]` with its terms."""
    for j, (source, target) in enumerate(zip(base, out, strict=True)):
        mine = [term for term in terms if term.weight == j]
        if not mine:
            target.copy_(source)
            continue
        wide = torch.promote_types(source.dtype, torch.float32)
        start = source.to(wide, copy=True)
        total = start.clone()
        for term in mine:
            rows = slice(term.row, term.row + (term.b.shape[0] - 1) * term.step + 1, term.step)
            delta = term.scale * (term.b.to(wide) @ term.a.to(wide).flatten(1))
            delta = delta.reshape(start[rows].shape)
            if term.magnitude is None:
                total[rows] += delta
            else:
                length = (start[rows] + delta).flatten(1).norm(dim=1)
                gain = (term.magnitude.to(wide) / length).reshape(-1, *[1] * (start.dim() - 1))
                total[rows] += (gain - 1) * start[rows] + gain * delta
        target.copy_(total.to(target.dtype))


def lora_rows(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> None:
    """`y[r] += sum_n scales[r, n] * B[slots[r, n]] (A[slots[r, n]] x[r])`, row by row."""
    wide = torch.promote_types(y.dtype, torch.float32)
    for r in range(x.shape[0]):
        total = y[r].to(wide, copy=True)
        for slot, scale in zip(slots[r].tolist(), scales[r].tolist(), strict=True):
            if slot < 0:
                continue
            rank = a.shape[1] if ranks is None else int(ranks[slot])
            down, up = a[slot, :rank].to(wide), b[slot, :rank].to(wide)
            if a.dim() == 3:
                total += scale * ((x[r].to(wide) @ down.T) @ up)
            else:
                inner = functional.conv2d(x[r].to(wide), down, None, stride, padding, dilation)
                total += scale * functional.conv2d(inner, up.T[:, :, None, None])
        if bool((slots[r] >= 0).any()):
            y[r] = total.to(y.dtype)
