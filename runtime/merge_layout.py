"""A live weight as a matrix over its own memory, and the record of where that memory is."""

from __future__ import annotations

from torch import Tensor

from heatsink.runtime.errors import AdapterError

Stamp = tuple[object, ...]


def stamp(weight: Tensor) -> Stamp:
    """Where a weight is and what it looks like; another one after it was moved or cast."""
    return weight.data_ptr(), weight.device, weight.dtype, tuple(weight.shape), weight.stride()


def matrix(weight: Tensor) -> Tensor:
    """The weight as `(out, everything else)` in the order of its memory, sharing that memory.

    Raises:
        AdapterError: its rows have gaps or are interwoven.
    """
    rows = weight.permute(_order(weight))
    if not rows.is_contiguous():
        raise AdapterError(
            f"a live weight {tuple(weight.shape)} with strides {weight.stride()} has no whole rows"
            " in memory"
        )
    return rows.view(rows.shape[0], -1)


def row_matrix(a: Tensor, weight: Tensor) -> Tensor:
    """An adapter's A `(r, ...)`, in the shape of the weight's rows, as `(r, everything else)`."""
    return a.permute(_order(weight)).reshape(a.shape[0], -1).contiguous()


def _order(weight: Tensor) -> tuple[int, ...]:
    """Dimension 0, then the others from the largest stride: of channels_last, channels go last."""
    # A dimension of size 1 may have any stride.
    strides = [
        0 if size == 1 else stride
        for size, stride in zip(weight.shape, weight.stride(), strict=True)
    ]
    if weight.is_contiguous():
        return tuple(range(weight.dim()))
    return (0, *sorted(range(1, weight.dim()), key=lambda dim: -strides[dim]))
