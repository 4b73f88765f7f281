"""A convolution and what surrounds it in a UNet, in one op.

    seen = upsample(concatenate(x, x2))                 nearest, by 1 or 2
    out = act(conv(seen, W) + bias + sample_add) + residual

Layouts: `x (B, C, H, W)` and `x2 (B, C2, H, W)` in channels_last memory (others are copied),
`weight (N, C + C2, height, width)` as PyTorch's, one stride and one padding for both directions,
`sample_add (B, N)`. The result is in channels_last memory. Nothing is concatenated, upsampled or
unfolded in memory: rows of a small block are gathered, or read where they lie.

CPU: as `kernels/linear.py` says of products, the depth K being (height, width, channels) of the
weight in this order; a pixel's bits depend on what the kernel sees there alone. Elsewhere, and
without the extension: PyTorch's concatenation, upsampling and convolution, then the epilogue.

Source for products gathered block by block: Chetlur and others, "cuDNN: efficient primitives for
deep learning" (https://arxiv.org/abs/1410.0759).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import check_shape
from heatsink.kernels._products import check_product, finish, result_columns, unpack, wide


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    sample_add: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    upsample: int = 1,
    activation: str = "",
) -> Tensor:
    """`act(conv(upsample(cat(x, x2)), W) + bias + sample_add) + residual`, with one rounding.

    Args:
        x: `(B, C, H, W)`, fp32 or bf16, off the CPU also fp16.
        weight: `(N, C + C2, height, width)`; with geglu, N / 2 rows of values, then of gates.
        bias: `(N,)`.
        x2: `(B, C2, H, W)`, whose channels come after those of `x`.
        residual: of the result's shape.
        sample_add: `(B, N)`.
        stride: of the kernel, in pixels, in both directions.
        padding: zeros at each side, in pixels once upsampled.
        upsample: 1, or 2 for nearest upsampling before the convolution.
        activation: "", "silu", "gelu", "gelu_tanh", "quick_gelu" or "geglu".

    Returns:
        `(B, N, H', W')`, with geglu `(B, N / 2, H', W')`, in channels_last memory.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, a number is out of range, `activation` is unknown
            or a gradient is required.
    """
    check_product(x, weight, bias, sample_add, residual, activation, x2)
    _check_images(x, x2, weight)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if upsample not in (1, 2):
        raise ValueError(f"upsample: expected 1 or 2, got {upsample!r}")
    shape = _shape(x, weight, stride, padding, upsample, activation)
    if min(shape[2:]) < 1:
        raise ValueError(f"x: expected images no smaller than the kernel, got {tuple(x.shape)}")
    if residual is not None:
        check_shape("residual", residual, shape)
    out: Tensor = torch.ops.heatsink.conv2d(
        x, x2, weight, bias, residual, sample_add, stride, padding, upsample, activation
    )
    return out


def _check_images(x: Tensor, x2: Tensor | None, weight: Tensor) -> None:
    for name, images in (("x", x), ("weight", weight)):
        if images.dim() != 4:
            raise ValueError(f"{name}: expected four dimensions, got {tuple(images.shape)}")
    channels = x.shape[1]
    if x2 is not None:
        if x2.dim() != 4:
            raise ValueError(f"x2: expected four dimensions, got {tuple(x2.shape)}")
        check_shape("x2", x2, (x.shape[0], x2.shape[1], *x.shape[2:]))
        channels += x2.shape[1]
    check_shape("weight", weight, (weight.shape[0], channels, *weight.shape[2:]))


def _shape(
    x: Tensor, weight: Tensor, stride: int, padding: int, upsample: int, activation: str
) -> tuple[int, int, int, int]:
    height, width = (
        (size * upsample + 2 * padding - kernel) // stride + 1
        for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return (x.shape[0], result_columns(weight.shape[0], activation), height, width)


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
    dtype = wide(x)
    seen = (x if x2 is None else torch.cat([x, x2], dim=1)).to(dtype)
    if seen.numel() == 0:
        return _conv2d_fake(
            x, x2, weight, bias, residual, sample_add, stride, padding, upsample, activation
        )
    if upsample == 2:
        seen = F.interpolate(seen, scale_factor=2.0, mode="nearest")
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(seen, weight.to(dtype), bias, stride=stride, padding=padding)
    out = finish(y, 1, sample_add, activation, residual, x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


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
    batch, columns, height, width = _shape(x, weight, stride, padding, upsample, activation)
    strides = (columns * height * width, 1, columns * width, columns)
    return x.new_empty_strided((batch, columns, height, width), strides)


def _conv2d_packed_torch(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    upsample: int,
    activation: str,
    scratch: Tensor,
    out: Tensor,
) -> None:
    geglu = activation == "geglu"
    columns = out.shape[1] * (2 if geglu else 1)
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    rows = unpack(weight, columns, kernel_height * kernel_width * channels, geglu)
    kernel = rows.view(columns, kernel_height, kernel_width, channels).permute(0, 3, 1, 2)
    out.copy_(
        _conv2d_torch(
            x, x2, kernel, bias, residual, sample_add, stride, padding, upsample, activation
        )
    )


def _conv2d_packed_fake(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    kernel_height: int,
    kernel_width: int,
    stride: int,
    padding: int,
    upsample: int,
    activation: str,
    scratch: Tensor,
    out: Tensor,
) -> None:
    return None


_EPILOGUE = "Tensor? bias, Tensor? residual, Tensor? sample_add"
_WINDOW = "int stride, int padding, int upsample, str activation"
torch.library.define(
    "heatsink::conv2d", f"(Tensor x, Tensor? x2, Tensor weight, {_EPILOGUE}, {_WINDOW}) -> Tensor"
)
# For engines, as `heatsink::linear_packed`; images, residual and out are in channels_last memory.
torch.library.define(
    "heatsink::conv2d_packed",
    f"(Tensor x, Tensor? x2, Tensor weight, {_EPILOGUE}, int kernel_height, int kernel_width, "
    f"{_WINDOW}, Tensor(a!) scratch, Tensor(b!) out) -> ()",
)
torch.library.impl("heatsink::conv2d", "default", _conv2d_torch)
torch.library.impl("heatsink::conv2d_packed", "default", _conv2d_packed_torch)
torch.library.register_fake("heatsink::conv2d", _conv2d_fake)
torch.library.register_fake("heatsink::conv2d_packed", _conv2d_packed_fake)
_native.load()
