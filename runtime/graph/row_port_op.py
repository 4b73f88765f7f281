"""Adapter ports of the native engine: ops whose shapes the batch alone fixes.

`heatsink::row_port` adds the terms of every row's adapters to what a layer gives:

    y[r, first:first + part_rows] += sum_i scales[r, i] * B[slots[r, i]] (A[slots[r, i]] x[r])

over the i whose slot is not negative; a row without any is returned as it is, bit by bit. A and B
are rows of the bank's tensors (`heatsink.runtime.port_layout`), of which the first `ranks` count.

`heatsink::port_linear` is a linear layer whose port comes before its activation:

    act(x W^T + bias + sample_add + terms) + residual

Here are their definitions in PyTorch, for parity in any dtype. A planned program calls
`kernels/lora_rows.py`, in place, and `kernels/lora_linear.py` (`heatsink.runtime.native.outs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.runtime.graph.plain import finish

torch.library.define(
    "heatsink::row_port",
    "(Tensor y, Tensor x, Tensor slots, Tensor scales, Tensor a, Tensor b, Tensor ranks, "
    "int port, int bank_slots, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int first, int part, int part_rows, int channel) -> Tensor",
)
torch.library.define(
    "heatsink::port_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? sample_add, "
    "str activation, Tensor slots, Tensor scales, Tensor a, Tensor b, Tensor ranks, "
    "int port, int bank_slots) -> Tensor",
)


@torch.library.impl("heatsink::row_port", "default")
def _row_port(
    y: Tensor,
    x: Tensor,
    slots: Tensor,
    scales: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    port: int,
    bank_slots: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    first: int,
    part: int,
    part_rows: int,
    channel: int,
) -> Tensor:
    """Add a port's terms.

    Args:
        y: `(batch, ..., out)`, or `(batch, out, H', W')` of a convolution.
        x: `(batch, ..., in)`, or `(batch, in, H, W)`.
        slots: `(batch, n)`; negative is none.
        scales: `(batch, n)`, ignored where there is none.
        a: `(ports * bank_slots, rank, in)`, or `(ports * bank_slots, rank, kh, kw, in)`.
        b: `(ports * bank_slots, rank, outputs)`.
        ranks: int32 `(ports * bank_slots,)`.
        port: which port's rows of them.
        bank_slots: slots of the bank.
        kernel: `(kh, kw)` of a convolution, empty for a linear.
        stride: of a convolution, as the next two.
        padding: zeros around the image.
        dilation: distance of the taps.
        first: the first of y's outputs that gets a term.
        part: the first of b's outputs that is used.
        part_rows: how many are.
        channel: the first of a's inputs that is used, for as many as x has.
    """
    result = y.clone()
    dtype = torch.promote_types(y.dtype, torch.float32)
    channels = slice(channel, channel + x.shape[1 if kernel else -1])
    for row, own in enumerate(slots.tolist()):
        outputs = result[row].narrow(0 if kernel else -1, first, part_rows)
        total = torch.zeros(outputs.shape, dtype=dtype, device=y.device)
        for i, slot in enumerate(own):
            if slot < 0:
                continue
            index = port * bank_slots + slot
            rank = int(ranks[index])
            down = a[index, :rank, ..., channels].to(dtype)
            up = b[index, :rank, part : part + part_rows].to(dtype)
            given, scale = x[row].to(dtype), scales[row, i].to(dtype)
            if kernel:
                taps = down.reshape(rank, *kernel, -1).movedim(-1, 1)
                h = F.conv2d(given[None], taps, None, list(stride), list(padding), list(dilation))
                total += scale * torch.einsum("rhw,ro->ohw", h[0], up)
            else:
                total += scale * (given @ down.mT @ up)
        if any(slot >= 0 for slot in own):
            outputs.copy_(outputs.to(dtype) + total)
    return result


@torch.library.impl("heatsink::port_linear", "default")
def _port_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    slots: Tensor,
    scales: Tensor,
    a: Tensor,
    b: Tensor,
    ranks: Tensor,
    port: int,
    bank_slots: int,
) -> Tensor:
    """A linear layer with a port before its activation.

    Args:
        x: `(batch, ..., in)`.
        weight: `(out, in)`; with geglu, values and then gates.
        bias: `(out,)`.
        residual: of the result's shape.
        sample_add: `(batch, out)`.
        activation: as `heatsink::linear` takes it.
        slots: `(batch, n)`, as the rest as in `row_port`; the port has all of the weight's rows.
        scales: `(batch, n)`.
        a: `(ports * bank_slots, rank, in)`.
        b: `(ports * bank_slots, rank, out)`.
        ranks: int32 `(ports * bank_slots,)`.
        port: which port's rows of them.
        bank_slots: slots of the bank.
    """
    given_dtype, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(dtype), weight.to(dtype)
    y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    given: tuple[Any, ...] = (y, x, slots, scales, a, b, ranks, port, bank_slots, [], [], [], [])
    y = torch.ops.heatsink.row_port(*given, 0, 0, weight.shape[0], 0)
    added = None if sample_add is None else sample_add.to(dtype)
    kept = None if residual is None else residual.to(dtype)
    return finish(y, added, activation, kept).to(given_dtype)


def _port_linear_fake(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    columns = weight.shape[0] // 2 if rest[3] == "geglu" else weight.shape[0]
    return x.new_empty((*x.shape[:-1], columns))


torch.library.register_fake("heatsink::row_port", lambda y, *rest: torch.empty_like(y))
torch.library.register_fake("heatsink::port_linear", _port_linear_fake)

ROW_PORT = torch.ops.heatsink.row_port.default
PORT_LINEAR = torch.ops.heatsink.port_linear.default
