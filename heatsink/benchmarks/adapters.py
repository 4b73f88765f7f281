"""What `lora_rows` is measured against: batched products of gathered A and B, in plain PyTorch.

That is the fastest that PyTorch has for rows with adapters of their own. PEFT's mixed batch does
less: it takes the adapters one after the other, each for its part of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.benchmarks.family import Cost, Family, Variant, compiled_variant
from heatsink.kernels._op import Inputs
from heatsink.kernels._windows import Pair


def lora_rows(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """`y` with the adapters of every row added; all slots are the bank's, no row is without."""
    rows = x.shape[0]
    seen = x if a.dim() == 3 else _unfolded(x, a, stride, padding, dilation)
    out = y if a.dim() == 3 else y.flatten(2).mT
    seen = seen.reshape(rows, -1, seen.shape[-1])
    delta = torch.zeros((), dtype=y.dtype, device=y.device)
    for i in range(slots.shape[1]):
        h = torch.bmm(seen, a[slots[:, i]].flatten(2).mT) * scales[:, i, None, None].to(y.dtype)
        delta = delta + torch.bmm(h, b[slots[:, i]])
    if a.dim() == 3:
        return out + delta.reshape(y.shape)
    return (out + delta).mT.reshape(y.shape)


def _unfolded(
    x: Tensor, a: Tensor, stride: int | Pair, padding: int | Pair, dilation: int | Pair
) -> Tensor:
    return F.unfold(x, tuple(a.shape[3:]), dilation, padding, stride).mT


def in_groups(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> Tensor:
    """The same as PEFT's mixed batch does it: an adapter at a time, on its rows, one adapter a row.

    For a convolution a convolution with A and one of 1x1 with B.
    """
    out = y.clone()
    for slot in range(a.shape[0]):
        for i in range(slots.shape[1]):
            chosen = (slots[:, i] == slot).nonzero()[:, 0]
            if chosen.numel() == 0:
                continue
            factor = scales[chosen, i].to(y.dtype).reshape(-1, *(1,) * (y.dim() - 1))
            if a.dim() == 3:
                term = F.linear(F.linear(x[chosen], a[slot]), b[slot].T)
            else:
                h = F.conv2d(x[chosen], a[slot], None, stride, padding, dilation)
                term = F.conv2d(h, b[slot].T[:, :, None, None])
            out[chosen] += term * factor
    return out


def cost(inputs: Inputs, outputs: Tensor) -> Cost:
    """X read, y read and written, and the A and B that are used, once; both products."""
    y, a, b, slots = (inputs[name] for name in ("y", "a", "b", "slots"))
    used = int((slots >= 0).sum())
    distinct = int(slots.unique().numel())
    tokens = y[0].numel() // b.shape[2]
    one = a[0].numel() + b[0].numel()
    size = y.element_size()
    return Cost(
        bytes=size * (inputs["x"].numel() + 2 * y.numel() + distinct * one),
        flops={_NAMES[y.dtype]: 2 * used * tokens * one},
    )


_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


FAMILIES = {
    "lora_rows": Family(
        lora_rows,
        lambda inputs: [
            Variant("PyTorch, an adapter at a time", lambda v: lambda: in_groups(**v)),
            compiled_variant("torch.compile", lora_rows),
        ],
        cost=cost,
    )
}
