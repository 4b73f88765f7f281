"""The operation `heatsink::adapter_port`: low-rank terms of some rows, added to what a layer gives.

    y[r, first:first + rows] += factor * sum_i scales[r, i] * B[slots[r, i]] (A[slots[r, i]] x[r])

for the rows r that `adapter_rows` lists, each once; others are returned as they are, bit by bit. A
and B are rows of the bank's tensors (`heatsink.runtime.port_layout`). A slot of -1 counts as the
row's first slot with scale 0, so it adds nothing and needs no values of its own.

One node stands for a port until a backend translates it: ONNX in `heatsink.export.onnx_ports`. Here
is its definition in PyTorch, for parity in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

torch.library.define(
    "heatsink::adapter_port",
    "(Tensor y, Tensor x, Tensor rows, Tensor slots, Tensor scales, Tensor a, Tensor b, "
    "int port, int bank_slots, int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "int first, int part, int part_rows, float factor) -> Tensor",
)


@torch.library.impl("heatsink::adapter_port", "default")
def _adapter_port(
    y: Tensor,
    x: Tensor,
    rows: Tensor,
    slots: Tensor,
    scales: Tensor,
    a: Tensor,
    b: Tensor,
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
) -> Tensor:
    """Add a port's terms.

    Args:
        y: `(batch, ..., out)`, or `(batch, out, H', W')` of a convolution.
        x: `(batch, ..., in)`, or `(batch, in, H, W)`.
        rows: `(adapted,)`, the rows with adapters.
        slots: `(adapted, n)`; the first of a row is not -1.
        scales: `(adapted, n)`.
        a: `(ports * bank_slots, rank, in)`, or `(ports * bank_slots, rank, kh, kw, in)`.
        b: `(ports * bank_slots, rank, outputs)`.
        port: which port's rows of them.
        bank_slots: slots of the bank.
        kernel: `(kh, kw)` of a convolution, empty for a linear.
        stride: of a convolution, as the next two.
        padding: zeros around the image.
        dilation: distance of the taps.
        first: the first of y's outputs that gets a term.
        part: the first of b's outputs that is used.
        part_rows: how many are.
        factor: what the module's weight was multiplied by.
    """
    if not rows.numel():
        return y.clone()
    absent = slots < 0
    index = torch.where(absent, slots[:, :1], slots) + port * bank_slots
    scale = scales.masked_fill(absent, 0) * factor
    down, up = a[index], b[index, :, part : part + part_rows]
    count = rows.shape[0]
    picked = x[rows]
    if kernel:
        taps = down.reshape(count, -1, *kernel, x.shape[1]).movedim(-1, 2)
        grouped = torch.nn.functional.conv2d(
            picked.reshape(1, -1, *x.shape[2:]), taps.flatten(0, 1), None,
            list(stride), list(padding), list(dilation), count,
        )  # fmt: skip
        hidden = grouped.reshape(*slots.shape, -1, *grouped.shape[2:])
        term = torch.einsum("mnrhw,mn,mnro->mohw", hidden, scale, up)
    else:
        tokens = picked.reshape(count, -1, x.shape[-1])
        hidden = torch.einsum("mtc,mnrc->mntr", tokens, down.flatten(3))
        term = torch.einsum("mntr,mn,mnro->mto", hidden, scale, up)
        term = term.reshape(*picked.shape[:-1], part_rows)
    result = y.clone()
    outputs = result.narrow(1 if kernel else -1, first, part_rows)
    outputs[rows] += term
    return result


def _fake(y: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(y)


torch.library.register_fake("heatsink::adapter_port", _fake)

ADAPTER_PORT = torch.ops.heatsink.adapter_port.default
