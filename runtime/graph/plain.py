"""What this package's ops compute, in plain PyTorch operations of any float dtype.

The kernels take float16, bfloat16 and float32; a reference in float64 needs this. Results have the
strides that the ops' own have, because what follows may view them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "geglu":
        return _geglu(x)
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "": lambda x: x,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    return table[activation](x)


def _geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * functional.gelu(gate)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(unseen, -torch.inf)
    # A query that sees no key gives 0.
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    return (weights @ v).transpose(1, 2).contiguous()


def _modulate(y: Tensor, scale: Tensor | None, shift: Tensor | None, at: int) -> Tensor:
    shape = [1] * y.dim()
    shape[0], shape[at] = y.shape[0], y.shape[at]
    if scale is not None:
        y = y * (1 + scale.reshape(shape))
    return y if shift is None else y + shift.reshape(shape)


def _group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    y = functional.group_norm(x, groups, weight, bias, eps)
    y = _modulate(y, scale, shift, 1)
    y = functional.silu(y) if silu else y
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    y = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _modulate(y, scale, shift, -1).contiguous()


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
) -> Tensor:
    return finish(functional.linear(x, weight, bias), sample_add, activation, residual)


def finish(
    y: Tensor, sample_add: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor:
    """What `heatsink::linear` does with its product and bias."""
    y = _activate(_modulate(y, None, sample_add, -1), activation)
    return (y if residual is None else y + residual).contiguous()


def _conv2d(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    activation: str,
) -> Tensor:
    if x2 is not None:
        x = torch.cat([x, x2], dim=1)
    if upsample != 1:
        x = x.repeat_interleave(upsample, dim=2).repeat_interleave(upsample, dim=3)
    y = functional.conv2d(x, weight, bias, stride=stride, padding=padding)
    y = _activate(_modulate(y, None, sample_add, 1), activation)
    y = y if residual is None else y + residual
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "heatsink.attention": _attention,
    "heatsink.group_norm_silu": _group_norm_silu,
    "heatsink.layer_norm": _layer_norm,
    "heatsink.geglu": _geglu,
    "heatsink.linear": _linear,
    "heatsink.conv2d": _conv2d,
}
