"""A convolution with what comes before and follows it.

    act(conv(upsample([x, x2])) + bias + sample_add) + residual

Layouts: x `(B, C, H, W)` and x2 `(B, C2, H, W)` of any strides, joined along the channels; upsample
1 or 2 (nearest); weight `(N, C + C2, kh, kw)`; bias `(N,)`; sample_add `(B, N)`; the result has
channels innermost in memory. PyTorch operations on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from heatsink.kernels.linear import activate


def _conv2d_torch(
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
    x = x.contiguous(memory_format=torch.channels_last)
    y = functional.conv2d(x, weight, bias, stride=stride, padding=padding)
    if sample_add is not None:
        y = y + sample_add[:, :, None, None]
    y = activate(y, activation)
    y = y if residual is None else y + residual
    return y.contiguous(memory_format=torch.channels_last)


def _conv2d_fake(
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
    channels, _, *kernel = weight.shape
    height, width = (
        (size * upsample + 2 * padding - k) // stride + 1
        for size, k in zip(x.shape[2:], kernel, strict=True)
    )
    return x.new_empty((x.shape[0], height, width, channels)).permute(0, 3, 1, 2)


torch.library.define(
    "heatsink::conv2d",
    "(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? residual, Tensor? sample_add, "
    "int stride, int padding, int upsample, str activation) -> Tensor",
)
torch.library.impl("heatsink::conv2d", "default", _conv2d_torch)
torch.library.register_fake("heatsink::conv2d", _conv2d_fake)
