"""What the products (`linear`, `conv2d`) share: the epilogue, its checks, and packed weights.

    out = act(product + bias + sample_add) + residual

    activation   "", "silu", "gelu", "gelu_tanh", "quick_gelu" (x / (1 + exp(-1.702 x))), or
                 "geglu": the weight's rows are values, then as many gates; value * gelu(gate)

Packed weights are in the order in which the C++ kernels read them (`csrc/product_pack.cpp`), the
same for every instruction set: panels of 32 rows of the weight, 16 if that is all there is, or with
geglu of 16 values and their gates. In fp32 a panel lies depth by rows. In bf16 it lies in tiles of
16 rows by 32 of the depth, each 16 pairs along the depth by 16 rows. What is missing is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels._checks import FLOATS, check_shape, check_tensors

ACTIVATIONS = ("", "silu", "gelu", "gelu_tanh", "quick_gelu", "geglu")
# Bytes of scratch that a thread needs in C++, `kScratchBytes` of csrc/product.h.
SCRATCH_BYTES = 862_208
_PANEL, _LANES, _TILE = 32, 16, 32


def scratch_bytes(threads: int | None = None) -> int:
    """Bytes of scratch for `linear_packed` and `conv2d_packed`, whatever their shapes.

    Args:
        threads: that may work at once; PyTorch's number if None. With less, fewer work.
    """
    return SCRATCH_BYTES * (torch.get_num_threads() if threads is None else threads)


def check_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_add: Tensor | None,
    residual: Tensor | None,
    activation: str,
    x2: Tensor | None = None,
) -> None:
    """Check dtypes and devices, and all whose shape does not depend on the op.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if a shape, a device or `activation` is wrong, or a gradient is required.
    """
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": residual, "x2": x2}
    check_tensors({**tensors, "sample_add": sample_add}, FLOATS)
    if x.dtype == torch.float16 and x.device.type == "cpu":
        raise TypeError("x: expected one of bfloat16, float32 on the CPU, got torch.float16")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    columns = weight.shape[0] if weight.dim() else 0
    if weight.numel() == 0 or (activation == "geglu" and columns % 2):
        even = "an even number of rows for geglu" if activation == "geglu" else "rows and columns"
        raise ValueError(f"weight: expected {even}, got {tuple(weight.shape)}")
    if bias is not None:
        check_shape("bias", bias, (columns,))
    if sample_add is not None:
        if x.dim() < 2:
            raise ValueError(f"x: expected (batch, ..., depth) with sample_add, got {x.dim()}-d")
        check_shape("sample_add", sample_add, (x.shape[0], columns))


def result_columns(columns: int, activation: str) -> int:
    """Columns of the result for a weight of `columns` rows."""
    return columns // 2 if activation == "geglu" else columns


def finish(
    y: Tensor,
    dim: int,
    sample_add: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The epilogue in fp32 PyTorch operations, after the bias; `dim` holds the columns."""
    y = y.float()
    if sample_add is not None:
        shape = [1] * y.dim()
        shape[0], shape[dim] = sample_add.shape
        y = y + sample_add.float().reshape(shape)
    if activation == "geglu":
        value, gate = y.chunk(2, dim=dim)
        y = value * F.gelu(gate)
    elif activation == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif activation == "quick_gelu":
        y = y * torch.sigmoid(1.702 * y)
    elif activation:
        y = F.silu(y) if activation == "silu" else F.gelu(y)
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype that PyTorch's product is taken in: on the CPU fp32, to round once at the end."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def as_rows(weight: Tensor) -> Tensor:
    """A weight as (columns, depth); a convolution's depth is (height, width, channels)."""
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(weight.shape[0], -1)


def packed_size(columns: int, depth: int, dtype: torch.dtype, geglu: bool) -> int:
    """Elements of a packed weight."""
    if dtype == torch.bfloat16:
        depth = -(-depth // _TILE) * _TILE
    whole, rest = columns // _PANEL, columns % _PANEL  # divmod knows no symbolic sizes
    last = 0 if rest == 0 else _LANES if rest <= _LANES and not geglu else _PANEL
    return depth * (whole * _PANEL + last)


def _pack_panels(rows: Tensor, width: int, pairs: bool) -> Tensor:
    depth = rows.shape[1]
    if not pairs:
        return rows.reshape(-1, width, depth).transpose(1, 2).reshape(-1)
    tiles = rows.reshape(-1, width // _LANES, _LANES, depth // _TILE, _TILE // 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(-1)


def pack(weight: Tensor, geglu: bool, pairs: bool) -> Tensor:
    """A weight (columns, depth) packed, in pairs as bf16 is or else as fp32 is."""
    columns, depth = weight.shape
    if pairs:
        weight = F.pad(weight, (0, -depth % _TILE))
    if geglu:
        missing = (0, 0, 0, -(columns // 2) % _LANES)
        value, gate = (F.pad(part, missing) for part in weight.chunk(2))
        both = torch.stack([x.unflatten(0, (-1, _LANES)) for x in (value, gate)], dim=1)
        return _pack_panels(both.flatten(0, 2), _PANEL, pairs)
    weight = F.pad(weight, (0, 0, 0, -columns % _LANES))
    whole = weight.shape[0] // _PANEL * _PANEL
    last = _pack_panels(weight[whole:], _LANES, pairs)
    return torch.cat([_pack_panels(weight[:whole], _PANEL, pairs), last])


def unpack(packed: Tensor, columns: int, depth: int, geglu: bool) -> Tensor:
    """The weight (columns, depth) that was packed."""
    places = torch.arange(1, columns * depth + 1, device=packed.device).view(columns, depth)
    places = pack(places, geglu, packed.dtype == torch.bfloat16)
    weight = packed.new_empty(columns * depth + 1)
    weight[places] = packed
    return weight[1:].view(columns, depth)
