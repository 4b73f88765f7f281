"""The translation of `heatsink::adapter_port` to ONNX, for ONNX Runtime's CPU provider.

What the ports of a graph have in common (which rows of the bank, their scales, the picked rows of
an input) is written for each and merged by the exporter afterwards.

The product of a row with A is `A x^T`, so that its sizes depend neither on the other rows nor, in
the dimension that is blocked, on how many adapters a row has. A convolution of stride 1 multiplies
the image's channels with all taps of A at once, and Col2Im shifts and adds the taps' small images;
any other gathers its windows first. `bench/ports.py` compares the two, and others.
ScatterND adds the terms in place and leaves the other rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any


def adapter_port(opset: int) -> Callable[..., Any]:
    """The translation for an opset."""
    import onnxscript

    op: Any = getattr(onnxscript, f"opset{min(opset, 23)}")

    def port(
        y: Any,
        x: Any,
        rows: Any,
        slots: Any,
        scales: Any,
        a: Any,
        b: Any,
        port: int,
        bank_slots: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        first: int,
        part: int,
        part_rows: int,
        factor: float,
    ) -> Any:
        bank = _Bank(op, rows, slots, scales, int(a.shape[1]), bank_slots)
        picked = op.Gather(x, rows, axis=0)
        if kernel:
            image = _Image(op, bank, kernel, stride, padding, dilation)
            hidden = image.shrink(picked, x, y, a, port)
        else:
            hidden = _shrink_tokens(op, bank, picked, x, a, port)
        hidden = op.Mul(hidden, bank.scales())
        if factor != 1.0:
            hidden = op.Mul(hidden, op.Constant(value_float=factor))
        up = bank.part(b, port, int(b.shape[2]), 1)
        if part_rows != int(b.shape[2]):
            up = _slice(op, up, (2,), (part,), (part + part_rows,), (1,))
        if kernel:
            term = op.MatMul(op.Transpose(up, perm=[0, 2, 1]), hidden)
        else:
            term = op.MatMul(op.Transpose(hidden, perm=[0, 2, 1]), up)
        axis = 1 if kernel else 2
        total = int(y.shape[1 if kernel else -1])
        if part_rows != total:
            before, after = [0, 0, 0], [0, 0, 0]
            before[axis], after[axis] = first, total - first - part_rows
            term = op.Pad(term, op.Constant(value_ints=[*before, *after]))
        sizes = [int(size) for size in y.shape[1:]]
        if len(sizes) != 2:
            term = op.Reshape(term, op.Constant(value_ints=[-1, *sizes]))
        index = op.Unsqueeze(rows, op.Constant(value_ints=[1]))
        return op.ScatterND(y, index, term, reduction="add")

    return port


class _Bank:
    """Which rows of the bank's tensors the rows with adapters take."""

    def __init__(
        self, op: Any, rows: Any, slots: Any, scales: Any, rank: int, bank_slots: int
    ) -> None:
        self._op, self._rank, self._bank_slots = op, rank, bank_slots
        # Every size is spelled out, for there may be no rows: then none can be inferred.
        self._count = op.Shape(rows)
        self._width = op.Shape(slots, start=1)
        absent = op.Less(slots, op.Constant(value_int=0))
        self._slots = op.Where(absent, _slice(op, slots, (1,), (0,), (1,), (1,)), slots)
        self._scales = op.Where(absent, op.Constant(value_float=0.0), scales)

    def shape(self, taps: int, *sizes: int) -> Any:
        """The shape `(adapted, n * rank * taps, *sizes)`."""
        op = self._op
        width = op.Mul(self._width, op.Constant(value_ints=[self._rank * taps]))
        rest = [op.Constant(value_ints=list(sizes))] if sizes else []
        return op.Concat(self._count, width, *rest, axis=0)

    def scales(self) -> Any:
        """`(adapted, n * rank, 1)`."""
        op = self._op
        wide = op.Unsqueeze(self._scales, op.Constant(value_ints=[2]))
        wide = op.Expand(wide, op.Constant(value_ints=[1, 1, self._rank]))
        return op.Reshape(wide, self.shape(1, 1))

    def part(self, tensor: Any, port: int, width: int, taps: int) -> Any:
        """`(adapted, n * rank * taps, width)`; of every rank the last tap comes first."""
        op = self._op
        length = self._rank * taps
        steps = [r * taps + taps - 1 - t for r in range(self._rank) for t in range(taps)]
        index = op.Mul(self._slots, op.Constant(value_int=length))
        index = op.Unsqueeze(index, op.Constant(value_ints=[2]))
        index = op.Add(index, op.Constant(value_ints=steps))
        index = op.Reshape(index, self.shape(taps))
        if port:
            index = op.Add(index, op.Constant(value_int=port * self._bank_slots * length))
        matrix = op.Reshape(tensor, op.Constant(value_ints=[-1, width]))
        return op.Gather(matrix, index, axis=0)


def _shrink_tokens(op: Any, bank: _Bank, picked: Any, x: Any, a: Any, port: int) -> Any:
    """`A x^T` of a linear: `(adapted, n * rank, positions)`."""
    sizes = [int(size) for size in x.shape[1:]]
    if len(sizes) != 2:
        shape = [-1, math.prod(sizes[:-1]), sizes[-1]]
        picked = op.Reshape(picked, op.Constant(value_ints=shape))
    down = bank.part(a, port, sizes[-1], 1)
    return op.MatMul(down, op.Transpose(picked, perm=[0, 2, 1]))


class _Image:
    """A convolution's product with A."""

    def __init__(
        self,
        op: Any,
        bank: _Bank,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> None:
        self._op, self._bank, self._kernel = op, bank, list(kernel)
        self._stride, self._padding, self._dilation = stride, padding, list(dilation)
        # What the shifted images lose at their edges, the other way round.
        steps = zip(kernel, dilation, padding, strict=True)
        self._margin = [(k - 1) * d - p for k, d, p in steps]

    def shrink(self, picked: Any, x: Any, y: Any, a: Any, port: int) -> Any:
        """`(adapted, n * rank, positions)`."""
        op, taps = self._op, math.prod(self._kernel)
        channels, height, width = (int(size) for size in x.shape[1:])
        sizes = [int(size) for size in y.shape[2:]]
        if list(self._stride) != [1, 1] or min(self._margin) < 0:
            columns = self._windows(picked, sizes)
            shape = op.Constant(value_ints=[-1, channels * taps, math.prod(sizes)])
            down = self._bank.part(a, port, channels * taps, 1)
            return op.MatMul(down, op.Reshape(columns, shape))
        shape = op.Constant(value_ints=[-1, channels, height * width])
        down = self._bank.part(a, port, channels, taps)
        hidden = op.MatMul(down, op.Reshape(picked, shape))
        if taps == 1 and self._margin == [0, 0]:
            return hidden
        shifted = op.Col2Im(
            hidden,
            op.Constant(value_ints=sizes),
            op.Constant(value_ints=self._kernel),
            dilations=self._dilation,
            pads=self._margin * 2,
        )
        return op.Reshape(shifted, self._bank.shape(1, math.prod(sizes)))

    def _windows(self, picked: Any, sizes: Sequence[int]) -> Any:
        """`(adapted, kh * kw * in, H', W')`."""
        op = self._op
        down, right = self._padding
        if down or right:
            pads = op.Constant(value_ints=[0, 0, down, right] * 2)
            picked = op.Pad(picked, pads)
        windows = []
        for i in range(self._kernel[0]):
            for j in range(self._kernel[1]):
                start = (i * self._dilation[0], j * self._dilation[1])
                reach = zip(start, sizes, self._stride, strict=True)
                stop = tuple(at + (size - 1) * step + 1 for at, size, step in reach)
                windows.append(_slice(op, picked, (2, 3), start, stop, tuple(self._stride)))
        return windows[0] if len(windows) == 1 else op.Concat(*windows, axis=1)


def _slice(
    op: Any,
    value: Any,
    axes: tuple[int, ...],
    start: tuple[int, ...],
    stop: tuple[int, ...],
    step: tuple[int, ...],
) -> Any:
    parts = (op.Constant(value_ints=list(given)) for given in (start, stop, axes, step))
    return op.Slice(value, *parts)
