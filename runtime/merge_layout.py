"""Where a live weight is in memory, and whether a merge can write it there."""

from __future__ import annotations

from torch import Tensor

from heatsink.runtime.errors import AdapterError
from heatsink.runtime.writes import writes

Stamp = tuple[object, ...]


def stamp(weight: Tensor) -> Stamp:
    """What changes when a weight is moved, cast or written, as far as `writes` counts.

    docs/merge.md says what follows.
    """
    shape = tuple(weight.shape)
    return weight.data_ptr(), weight.device, weight.dtype, shape, weight.stride(), writes(weight)


def check_layout(key: str, weight: Tensor) -> None:
    """Raise `AdapterError` where a weight is neither contiguous nor channels_last."""
    channels_last = weight.dim() > 2 and weight.movedim(1, -1).is_contiguous()
    if not (weight.is_contiguous() or channels_last):
        raise AdapterError(
            f"the live weight {key} {tuple(weight.shape)} has the strides {weight.stride()},"
            " expected contiguous or channels_last memory"
        )
