"""Which operators write into memory that is given to them, and allocate none of their own.

An operator that is not here runs all the same: its result is copied into its place, and the
program lists it as unplanned. ATen has an `out` overload of nearly everything, but those it
generates allocate a result and copy it; the ones named here are written by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]
MakeStep = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], Step]

aten = torch.ops.aten


def _call(function: Any) -> MakeStep:
    """The same arguments, and `out`."""

    def make(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
        named = {**kwargs, "out": out}
        return lambda: function(*args, **named)

    return make


_BINARY: dict[Any, Any] = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
}
_OTHERS: dict[Any, Any] = {
    aten.silu.default: aten.silu.out,
    aten.sigmoid.default: aten.sigmoid.out,
    aten.gelu.default: aten.gelu.out,
    aten.exp.default: aten.exp.out,
    aten.sin.default: aten.sin.out,
    aten.cos.default: aten.cos.out,
    aten.cat.default: aten.cat.out,
    aten.bmm.default: aten.bmm.out,
    aten.mm.default: aten.mm.out,
    aten.addmm.default: aten.addmm.out,
}


def _binary(function: Any) -> MakeStep:
    """A number becomes a tensor of no dimensions once: each call would make one otherwise."""

    def make(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
        left, right = (
            value if isinstance(value, Tensor) else torch.tensor(value) for value in args[:2]
        )
        named = {**kwargs, "out": out}
        return lambda: function(left, right, **named)

    return make


def _copy(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
    source = args[0]
    return lambda: out.copy_(source)


def _reshape(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
    """A reshape that is no view copies into memory that has the new shape."""
    source = args[0]
    target = out.view(source.shape)
    return lambda: target.copy_(source)


OUTS: dict[Any, MakeStep] = {
    **{target: _binary(function) for target, function in _BINARY.items()},
    **{target: _call(function) for target, function in _OTHERS.items()},
    aten.contiguous.default: _copy,
    aten.clone.default: _copy,
    aten.to.dtype: _copy,
    aten._to_copy.default: _copy,
    aten.reshape.default: _reshape,
}


def unplanned(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Step:
    """Run the operator as it is and copy its result, or results, into their places."""
    outs = [out] if isinstance(out, Tensor) else list(out)

    def run() -> None:
        result = target(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else list(result)
        for place, value in zip(outs, results, strict=True):
            place.copy_(value)

    return run
