"""How often a tensor was written to: what copies were made of it look whether they are stale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COUNT = "_heatsink_writes"


def writes(tensor: Tensor) -> int:
    """A number that is another after each write that PyTorch counts, or `note_write` was told of.

    PyTorch counts none through `.data` or another tensor made of the same memory, by kernels that
    go by the address, or into tensors made under `torch.inference_mode()`.
    """
    if tensor.is_inference():
        return int(getattr(tensor, _COUNT, 0))
    return int(tensor._version)


def note_write(tensors: Iterable[Tensor]) -> None:
    """Count a write into each of these, for writers that PyTorch doesn't see."""
    for tensor in tensors:
        if tensor.is_inference():
            setattr(tensor, _COUNT, writes(tensor) + 1)
        else:
            torch.autograd.graph.increment_version(tensor)
