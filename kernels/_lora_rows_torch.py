"""`heatsink::lora_rows` in PyTorch operations: for where there is no compiler and no Triton.

Every sum is taken term by term, in elementwise operations, which give an element the same bits
wherever it lies. A batched matrix product does not, on the CPU: with two threads `torch.bmm` of one
token of 1,280 channels and 16 ranks gave a sample other last bits in a batch of two than alone. The
C++ extension gives other last bits again (it contracts), within the same error.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels._windows import Window


def check_slots(slots: Tensor, count: int) -> None:
    """Raise RuntimeError for a slot that the bank does not have."""
    for slot in slots.unique().tolist():
        if slot >= count:
            raise RuntimeError(f"slots: expected slots of the bank, up to {count - 1}, got {slot}")


def _patches(x: Tensor, window: Window) -> Tensor:
    """`(R, in, H, W)` -> `(R, T, in * taps)` float32: what each output sees, channels first."""
    seen = F.unfold(x.float(), window.kernel, window.dilation, window.padding, window.stride)
    return seen.mT


def _product(x: Tensor, weights: Tensor) -> Tensor:
    """`(R, T, K)` times `(R, K, N)`, summed over K in order."""
    total = torch.zeros((*x.shape[:2], weights.shape[2]), device=x.device)
    for k in range(x.shape[2]):
        total = total + x[:, :, k : k + 1] * weights[:, k : k + 1]
    return total


def lora_rows_torch(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    window: Window,
) -> None:
    """Add every row's adapters to `y`, in place."""
    check_slots(slots, a.shape[0])
    if a.shape[0] == 0:
        return
    rows, rank = x.shape[0], a.shape[1]
    linear = a.dim() == 3
    given = x.float().reshape(rows, -1, x.shape[-1]) if linear else _patches(x, window)
    down, up = a.flatten(2), b
    if ranks is not None:
        there = torch.arange(rank, device=a.device) < ranks[:, None]
        down = torch.where(there[..., None], down, 0)
        up = torch.where(there[..., None], up, 0)
    delta = torch.zeros((*given.shape[:2], b.shape[2]), device=x.device)
    for i in range(slots.shape[1]):
        slot = slots[:, i].clamp(min=0).long()
        h = _product(given, down[slot].float().mT) * scales[:, i, None, None]
        term = _product(h, up[slot].float())
        delta = torch.where((slots[:, i] >= 0)[:, None, None], delta + term, delta)
    used = (slots >= 0).any(1).reshape(-1, *(1,) * (y.dim() - 1))
    delta = delta.reshape(y.shape) if linear else delta.mT.reshape(y.shape)
    y.copy_(torch.where(used, (y.float() + delta).to(y.dtype), y))
