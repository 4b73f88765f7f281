"""A linear layer and what follows it: `act(x W^T + bias + sample_add) + residual`.

Layouts: x `(..., K)`, weight `(N, K)`, bias `(N,)`, sample_add `(batch, N)`, residual and result
`(..., N)`. With activation "geglu" the weight's rows are [values; gates] and the result is
`(..., N / 2)`, value * gelu(gate). PyTorch operations on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "quick_gelu", "geglu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of `ACTIVATIONS`; "geglu" halves the last dimension."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "geglu":
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate)
    return x


def _linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
) -> Tensor:
    y = functional.linear(x, weight, bias)
    if sample_add is not None:
        y = y + sample_add.reshape(y.shape[0], *(1,) * (y.dim() - 2), y.shape[-1])
    y = activate(y, activation)
    return (y if residual is None else y + residual).contiguous()


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
) -> Tensor:
    width = weight.shape[0] // (2 if activation == "geglu" else 1)
    return x.new_empty((*x.shape[:-1], width))


torch.library.define(
    "heatsink::linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? sample_add, "
    "str activation) -> Tensor",
)
torch.library.impl("heatsink::linear", "default", _linear_torch)
torch.library.register_fake("heatsink::linear", _linear_fake)
