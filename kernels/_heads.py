"""What the attention ops share: checks of heads, and how heads and their strides reach kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heatsink.kernels._checks import check_shape
from heatsink.kernels._launch import ALIGNMENT, Value, address

MAX_HEAD_DIM = 256
VAE_HEAD_DIM = 512
# Strides reach kernels as 32-bit numbers.
MAX_STRIDE = 2**31


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the shapes are those of attention and the head dim is in range."""
    of_q, of_k = q.shape, k.shape
    if len(of_q) != 4:
        raise ValueError(f"q: expected (B, Sq, H, D), got shape {tuple(of_q)}")
    if len(of_k) != 4:
        raise ValueError(f"k: expected (B, Sk, H, D), got shape {tuple(of_k)}")
    batch, _, heads, head_dim = of_q
    if not (1 <= head_dim <= MAX_HEAD_DIM or head_dim == VAE_HEAD_DIM):
        raise ValueError(
            f"q: expected a head dim of 1 to {MAX_HEAD_DIM}, or {VAE_HEAD_DIM}, got {head_dim}"
        )
    expected = (batch, of_k[1], heads, head_dim)
    check_shape("k", k, expected)
    check_shape("v", v, expected)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale to use.

    Raises:
        ValueError: unless it is None or positive and finite.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale: expected a positive finite number, got {scale}")
    return float(scale)


def check_bias(bias: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `bias` broadcasts to `shape`."""
    fits = bias.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(bias.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"bias: expected a shape that broadcasts to {shape}, got {tuple(bias.shape)}"
        )


def parts(size: int, split: int, least: int = 16) -> tuple[int, int]:
    """How a dimension is tiled: a power of two, and a smaller second one or 0.

    Args:
        size: what must be covered, from 1 on.
        split: 0 pads to the next power of two instead.
        least: the smallest tile.

    Returns:
        `(first, second)`: 80 -> (64, 16), 64 -> (64, 0), 112 -> (128, 0).
    """
    padded = max(least, 1 << (size - 1).bit_length())
    first = padded // 2
    second = max(least, 1 << (size - first - 1).bit_length()) if first < size else 0
    if not split or first < least or not 0 < second < first:
        return padded, 0
    return first, second


def stride_unit(x: Tensor) -> int:
    """What strides are passed in units of: the elements in 16 bytes, or 1 where rows are no such.

    A stride of 40 is no multiple of 16, so Triton would not see that heads of 40 begin at
    multiples of 16 bytes, and would load them an element at a time.
    """
    unit = ALIGNMENT // x.element_size()
    return unit if x.shape[-1] % unit == 0 else 1


def is_settled(x: Tensor, broadcast: bool = True) -> bool:
    """Whether `settled` gives back `x` itself."""
    unit = stride_unit(x)
    steps = list(zip(x.shape[:-1], x.stride()[:-1], strict=True))
    if any(size > 1 and step >= MAX_STRIDE for size, step in steps):
        even = False
    elif broadcast:
        even = all(size == 1 or step % unit == 0 for size, step in steps)
    else:
        even = all(step > 0 and step % unit == 0 for _, step in steps)
    dense = x.shape[-1] == 1 or x.stride(-1) == 1
    return dense and even and address(x) % ALIGNMENT == 0


def settled(x: Tensor, broadcast: bool = True) -> Tensor:
    """`x`, or a copy, such that its sizes and dtype alone decide which binary reads it.

    How a kernel's loads are laid out, and on some architectures its sums with them, follows from
    what Triton knows of addresses and strides. So a last dimension that is not dense, an address
    off 16 bytes, and strides off `stride_unit` or of 2^31 elements cost a copy, and strides are
    never specialised. Views of a packed projection and of a batch need none where rows are
    multiples of 16 bytes.

    Args:
        x: `(..., D)`.
        broadcast: whether strides may be 0, as a TMA descriptor's may not.
    """
    if is_settled(x, broadcast):
        return x
    once = x
    if broadcast:
        for dim, step in enumerate(x.stride()[:-1]):
            once = once.narrow(dim, 0, 1) if step == 0 else once
    copy = torch.empty(once.shape, dtype=x.dtype, device=x.device).copy_(once)
    return copy.expand(x.shape)


def strides(x: Tensor | None, name: str, dims: str) -> dict[str, Value]:
    """A tensor's strides as kernel parameters, in units of `stride_unit`; None where it is None.

    Args:
        x: `settled`; its last dimension is dense and has no parameter.
        name: what comes after `stride_`.
        dims: a letter for each dimension but the last; parameters are in the order b, h, tokens.
    """
    by_dim: dict[str, Value] = dict.fromkeys(dims)
    if x is not None:
        unit = stride_unit(x)
        by_dim = {dim: step // unit for dim, step in zip(dims, x.stride()[:-1], strict=True)}
    return {f"stride_{name}{dim}": by_dim[dim] for dim in "bhmns" if dim in by_dim}
