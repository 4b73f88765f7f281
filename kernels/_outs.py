"""Variants of ops that write into given memory and allocate nothing: `heatsink::<op>_out`.

    heatsink::<op>_out(the op's arguments, Tensor(a!) out) -> ()

`out` has the result's shape and dtype. It need not be dense: rows of the last dimension (of the
channels, where the op's result has them innermost) have to be, and to lie at one distance, so that
a result may be a part of something larger. It shares no memory with the arguments, but may lie
exactly where those that the op names `in_place` do. The bits are the op's.

C++ serves the CPU and a Triton launch CUDA; elsewhere the op's PyTorch implementation is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], bool]


def even_rows(x: Tensor) -> bool:
    """Whether rows of the last dimension are dense and lie at one distance."""
    return (x.shape[-1] == 1 or x.stride(-1) == 1) and _even(x.shape[:-1], x.stride()[:-1])


def even_pixels(x: Tensor) -> bool:
    """Whether channels `(N, C, ...)` are dense and a sample's pixels lie at one distance."""
    return (x.shape[1] == 1 or x.stride(1) == 1) and _even(x.shape[2:], x.stride()[2:])


def dense_heads(x: Tensor) -> bool:
    """Whether the last dimension is dense."""
    return x.shape[-1] == 1 or x.stride(-1) == 1


def _even(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    expected = None
    for size, stride in reversed(list(zip(sizes, strides, strict=True))):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True


@dataclass(frozen=True)
class Out:
    """The variant of one op.

    Attributes:
        name: the op's.
        schema: the op's, `(...) -> Tensor`.
        layout: what memory of `out` is written to.
        whole: what memory of `out` the Triton launches write to; other is copied to.
        in_place: how many leading arguments `out` may lie exactly on.
        shape: of the result, from the arguments; the first one's by default.
    """

    name: str
    schema: str
    layout: Layout
    whole: Layout = Tensor.is_contiguous
    in_place: int = 1
    shape: Callable[..., Sequence[int]] = lambda x, *_: x.shape

    def define(self, by_torch: Callable[..., Tensor], by_triton: Callable[..., Tensor]) -> None:
        """Register `heatsink::<name>_out`.

        Args:
            by_torch: the op in PyTorch operations.
            by_triton: the op with an argument `out` more, which may be None.
        """
        op = f"heatsink::{self.name}_out"
        torch.library.define(op, self.schema.replace(") -> Tensor", ", Tensor(a!) out) -> ()"))
        torch.library.impl(op, "default", lambda *given: self.copied(by_torch, *given))
        torch.library.impl(op, "cuda", lambda *given: self.launched(by_triton, *given))
        torch.library.register_fake(op, self._check)

    def copied(self, by_torch: Callable[..., Tensor], *given: Any) -> None:
        """`out`, which comes last, by the op in PyTorch operations."""
        self._check(*given)
        check_memory("out", given[-1], given[:-1], self.in_place)
        given[-1].copy_(by_torch(*given[:-1]))

    def launched(self, by_triton: Callable[..., Tensor], *given: Any) -> None:
        """`out`, which comes last, by launches that write to it where they can."""
        self._check(*given)
        check_memory("out", given[-1], given[:-1], self.in_place)
        if self.whole(given[-1]):
            by_triton(*given)
        else:
            given[-1].copy_(by_triton(*given[:-1], None))

    def __call__(self, *given: Any) -> Tensor:
        """Check `out`, which comes last, write it and return it."""
        self._check(*given)
        getattr(torch.ops.heatsink, f"{self.name}_out")(*given)
        out: Tensor = given[-1]
        return out

    def _check(self, *given: Any) -> None:
        *args, out = given
        if not isinstance(out, Tensor):
            raise TypeError(f"out: expected a tensor, got {type(out).__name__}")
        shape = tuple(self.shape(*args))
        if tuple(out.shape) != shape:
            raise ValueError(f"out: expected shape {shape}, got {tuple(out.shape)}")
        if out.dtype != args[0].dtype:
            raise TypeError(f"out: expected {args[0].dtype}, got {out.dtype}")
        if out.device != args[0].device:
            raise ValueError(f"out: expected device {args[0].device}, got {out.device}")
        if out.numel() and not self.layout(out):
            raise ValueError(
                f"out: expected dense rows at one distance, got strides {out.stride()}"
            )


def check_memory(name: str, out: Tensor, args: Sequence[Any], in_place: int) -> None:
    """Raise ValueError if a result's memory is also an argument's.

    Args:
        name: the result's.
        out: the result.
        args: the arguments; only tensors matter.
        in_place: on how many of the first `out` may lie exactly.
    """
    for place, x in enumerate(args):
        if not isinstance(x, Tensor) or not _meet(out, x):
            continue
        if place >= in_place or not _same_place(out, x):
            raise ValueError(f"{name}: expected memory apart from that of the arguments")


def _meet(x: Tensor, y: Tensor) -> bool:
    """Whether the bytes from first to last of both have some in common."""
    if x.numel() == 0 or y.numel() == 0:
        return False
    (a, b), (c, d) = (_bytes(t) for t in (x, y))
    return a < d and c < b


def _bytes(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    begin = x.data_ptr()
    return begin, begin + (last + 1) * x.element_size()


def _same_place(out: Tensor, x: Tensor) -> bool:
    pairs = zip(out.shape, out.stride(), x.stride(), strict=True)
    return out.data_ptr() == x.data_ptr() and all(s == 1 or a == b for s, a, b in pairs)
