"""Which operators write into memory that is given to them, and allocate none of their own.

An operator that is not here runs all the same: its result is copied into its place, and the
program lists it as unplanned. ATen has an `out` overload of nearly everything, but those it
generates allocate a result and copy it; the ones named here are written by hand.

A step is a call with its arguments bound. PyTorch's own functions are taken where there are any:
they cost half of what the same operator costs through `torch.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import heatsink.kernels
from heatsink.runtime.graph.row_port_op import PORT_LINEAR, ROW_PORT
from heatsink.runtime.native.library_outs import conv2d_step, forget_kernel, linear_step

Step = Callable[[], Any]
MakeStep = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], Step | None]

heatsink.kernels.load()
aten = torch.ops.aten


def _call(function: Any) -> MakeStep:
    """The same arguments, and `out`."""

    def make(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
        return partial(function, *args, **kwargs, out=out)

    return make


_BINARY: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.le.Tensor: torch.le,
    aten.eq.Scalar: torch.eq,
}
_OTHERS: dict[Any, Any] = {
    aten.silu.default: aten.silu.out,
    aten.gelu.default: aten.gelu.out,
    aten.sigmoid.default: torch.sigmoid,
    aten.exp.default: torch.exp,
    aten.sin.default: torch.sin,
    aten.cos.default: torch.cos,
    aten.cat.default: torch.cat,
    aten.concat.default: torch.cat,
    aten.bmm.default: torch.bmm,
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.argmax.default: torch.argmax,
    aten.softmax.int: torch.softmax,
    aten.index.Tensor: aten.index.Tensor_out,
}
# On a CUDA device.
_LIBRARY: dict[str, Callable[..., Step | None]] = {"linear": linear_step, "conv2d": conv2d_step}
_PRODUCTS = (torch.float32, torch.bfloat16)
_OURS = ("attention", "geglu", "group_norm_silu", "layer_norm", "rms_norm", "silu_mul")


def _binary(function: Any) -> MakeStep:
    """A number becomes a tensor of no dimensions once: each call would make one otherwise."""

    def make(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
        left, right = (
            value if isinstance(value, Tensor) else torch.tensor(value) for value in args[:2]
        )
        return partial(function, left, right, **kwargs, out=out)

    return make


def _ours(name: str) -> MakeStep:
    """The variant of an op of this package that writes into `out`, its last argument."""
    op: Any = getattr(torch.ops.heatsink, name).default
    into: Any = getattr(torch.ops.heatsink, f"{name}_out").default

    def make(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
        return partial(into, *_positional(op, args, kwargs), out)

    return make


# A weight's packed form, kept as long as the weight: programs of several batch sizes share it.
_PACKED: Any = WeakIdKeyDictionary()
_NO_SCRATCH = torch.empty(0, dtype=torch.uint8)


def _packed(weight: Tensor, activation: str) -> Tensor:
    geglu = activation == "geglu"
    found = _PACKED.get(weight)
    if found is None or found[0] != geglu:
        found = geglu, torch.ops.heatsink.pack_linear(weight, geglu)
        _PACKED[weight] = found
    packed: Tensor = found[1]
    return packed


def forget_packed(weight: Tensor) -> None:
    """Pack a weight anew when it is next used: it was written to."""
    _PACKED.pop(weight, None)
    forget_kernel(weight)


def _positional(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    rest = op._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(a.name, a.default_value) for a in rest)]


def _linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step | None:
    """The product with a packed weight; threads keep their scratch."""
    op = torch.ops.heatsink.linear.default
    x, weight, *rest = _positional(op, args, kwargs)
    if x.device.type == "cuda":
        return _LIBRARY["linear"](x, weight, *rest, out)
    if x.dtype not in _PRODUCTS or x.device.type != "cpu":
        return None
    into: Any = torch.ops.heatsink.linear_packed.default
    return partial(into, x, _packed(weight, rest[-1]), *rest, _NO_SCRATCH, out)


def _conv2d(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step | None:
    """The convolution with a packed weight, between images in channels_last memory."""
    op = torch.ops.heatsink.conv2d.default
    x, x2, weight, bias, residual, sample_add, *window, activation = _positional(op, args, kwargs)
    if x.device.type == "cuda":
        return _LIBRARY["conv2d"](*_positional(op, args, kwargs), out)
    images = [value for value in (x, x2, residual, out) if value is not None]
    if x.dtype not in _PRODUCTS or x.device.type != "cpu" or not all(map(_channels_last, images)):
        return None
    into: Any = torch.ops.heatsink.conv2d_packed.default
    packed = _packed(weight, activation)
    operands = (x, x2, packed, bias, residual, sample_add, *weight.shape[2:], *window)
    return partial(into, *operands, activation, _NO_SCRATCH, out)


def _channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def _copy(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
    return partial(out.copy_, args[0])


def _reshape(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
    """A reshape that is no view copies into memory that has the new shape."""
    source = args[0]
    return partial(out.view(source.shape).copy_, source)


def _embedding(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step | None:
    """Rows of a table; what else the operator takes concerns gradients."""
    table, ids = args[:2]
    if not (out.is_contiguous() and ids.is_contiguous()):
        return None
    return partial(torch.index_select, table, 0, ids.view(-1), out=out.view(-1, table.shape[1]))


def _upsample(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step | None:
    """Nearest neighbours at a whole scale, a power of two: each pixel several times."""
    x = args[0]
    sizes = list(zip(out.shape[2:], x.shape[2:], strict=True))
    scales = [large // small for large, small in sizes]
    if any(large % small for large, small in sizes) or any(s & (s - 1) for s in scales):
        return None
    blocks = out.unflatten(3, (-1, scales[1])).unflatten(2, (-1, scales[0]))
    return partial(blocks.copy_, x[:, :, :, None, :, None])


def _row_port(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step:
    """The kernel adds to y; the views that it takes are made once."""
    y, x, slots, scales, a, b, ranks, port, count, kernel, *rest = _positional(
        ROW_PORT, args, kwargs
    )
    stride, padding, dilation, first, part, part_rows, channel = rest
    rows = slice(port * count, (port + 1) * count)
    down, up = a[rows], b[rows].narrow(2, part, part_rows)
    if kernel:
        # The bank keeps a convolution's inputs behind its taps.
        down = down.permute(0, 1, 4, 2, 3) if down.dim() == 5 else down[..., None, None]
    dim = 1 if kernel else x.dim() - 1
    given = (x, down.narrow(2, channel, x.shape[dim]), up, slots, scales, ranks[rows])
    geometry = (*stride, *padding, *dilation) if kernel else (1, 1, 0, 0, 1, 1)
    add: Any = torch.ops.heatsink.lora_rows.default
    step = partial(add, out.narrow(dim, first, part_rows), *given, *geometry)
    if y.data_ptr() == out.data_ptr():
        return step

    def copy_and_add() -> None:
        out.copy_(y)
        step()

    return copy_and_add


def _port_linear(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> Step | None:
    """As `_linear`, with the port's rows of the bank."""
    x, weight, *rest, port, count = _positional(PORT_LINEAR, args, kwargs)
    if x.dtype not in _PRODUCTS or x.device.type != "cpu":
        return None
    bias, residual, sample_add, activation, slots, scales, *bank = rest
    rows = slice(port * count, (port + 1) * count)
    a, b, ranks = (tensor[rows] for tensor in bank)
    into: Any = torch.ops.heatsink.lora_linear_packed.default
    product = (x, _packed(weight, activation), bias, residual, sample_add, activation)
    return partial(into, *product, a, b, slots, scales, ranks, _NO_SCRATCH, out)


PACKING = frozenset(
    {torch.ops.heatsink.linear.default, torch.ops.heatsink.conv2d.default, PORT_LINEAR}
)
"""Operators whose step holds another form of their weight, made when the step is."""

OUTS: dict[Any, MakeStep] = {
    **{target: _binary(function) for target, function in _BINARY.items()},
    **{target: _call(function) for target, function in _OTHERS.items()},
    **{getattr(torch.ops.heatsink, name).default: _ours(name) for name in _OURS},
    torch.ops.heatsink.linear.default: _linear,
    torch.ops.heatsink.conv2d.default: _conv2d,
    ROW_PORT: _row_port,
    PORT_LINEAR: _port_linear,
    aten.contiguous.default: _copy,
    aten.clone.default: _copy,
    aten.to.dtype: _copy,
    aten.to.device: _copy,
    aten._to_copy.default: _copy,
    aten.reshape.default: _reshape,
    aten.embedding.default: _embedding,
    aten.upsample_nearest2d.vec: _upsample,
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


def is_ours(step: Step) -> bool:
    """Whether a step is one call of an op of this package, and so may be recorded."""
    return isinstance(step, partial) and getattr(step.func, "namespace", "") == "heatsink"
