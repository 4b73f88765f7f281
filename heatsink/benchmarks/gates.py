"""What `geglu`, `silu_mul` and `rotary` are measured against: the expression in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.benchmarks.bundled import CASES
from heatsink.benchmarks.family import Family, compiled_variant


def geglu(x: Tensor) -> Tensor:
    """`value * gelu(gate)` of the halves of the last dimension, as diffusers has it."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`."""
    return F.silu(gate) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Pairs turned by their angles; pairs are neighbours, or a half apart.

    Args:
        x: `(B, S, H, D)`.
        cos: `(S, D / 2)` or `(B, S, D / 2)`.
        sin: like `cos`.
        interleaved: whether pairs are neighbours.
    """
    cos, sin = (t.unsqueeze(-2) for t in (cos, sin))
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    if interleaved:
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    return torch.cat(turned, dim=-1).to(x.dtype)


FAMILIES = {
    "geglu": Family(
        geglu,
        lambda inputs: [compiled_variant("torch.compile", geglu)],
        bundled=CASES["geglu"],
    ),
    "silu_mul": Family(
        silu_mul,
        lambda inputs: [compiled_variant("torch.compile", silu_mul)],
        bundled=CASES["silu_mul"],
    ),
    "rotary": Family(rotary, lambda inputs: [compiled_variant("torch.compile", rotary)]),
}
