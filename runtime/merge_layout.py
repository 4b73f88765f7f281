"""Where a live weight is in memory, and whether a merge can write it there."""

from __future__ import annotations

from torch import Tensor

from heatsink.runtime.errors import AdapterError

Stamp = tuple[object, ...]


def stamp(weight: Tensor) -> Stamp:
    """What changes when a weight is moved, cast or written, as far as PyTorch counts writes.

    It counts none through `weight.data` or another tensor made of the same memory, by kernels that
    go by the address, or into inference tensors. docs/merge.md says what follows.
    """
    version = 0 if weight.is_inference() else weight._version
    shape = tuple(weight.shape)
    return weight.data_ptr(), weight.device, weight.dtype, shape, weight.stride(), version


def check_layout(key: str, weight: Tensor) -> None:
    """Raise `AdapterError` where a weight is neither contiguous nor channels_last."""
    channels_last = weight.dim() > 2 and weight.movedim(1, -1).is_contiguous()
    if not (weight.is_contiguous() or channels_last):
        raise AdapterError(
            f"the live weight {key} {tuple(weight.shape)} has the strides {weight.stride()},"
            " expected contiguous or channels_last memory"
        )
