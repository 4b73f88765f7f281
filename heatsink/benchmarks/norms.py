"""What `group_norm_silu`, `layer_norm` and `rms_norm` are measured against: PyTorch's own.

Images of `group_norm_silu` are `(N, C, H, W)` in channels_last memory; PyTorch gets them as they
are, and in contiguous memory, copied before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from heatsink.benchmarks.bundled import CASES
from heatsink.benchmarks.family import (
    Family,
    LeftOut,
    Variant,
    compiled_variant,
)
from heatsink.kernels._op import Inputs


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """`F.group_norm` of `(N, C, ...)`, the modulation of each sample, and `F.silu`."""
    y = F.group_norm(x, groups, weight, bias, eps)
    pixels = [None] * (x.dim() - 2)
    if scale is not None:
        y = y * (1 + scale[:, :, *pixels])
    if shift is not None:
        y = y + shift[:, :, *pixels]
    return F.silu(y) if silu else y


def _contiguous(inputs: Inputs) -> Inputs:
    return {**inputs, "x": inputs["x"].contiguous()}


def _group_norm_others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    def prepare(values: Inputs) -> Callable[[], Tensor]:
        changed = _contiguous(values)
        return lambda: group_norm_silu(**changed)

    return [
        Variant("PyTorch eager, NCHW", prepare),
        compiled_variant("torch.compile", group_norm_silu),
        compiled_variant("torch.compile, NCHW", group_norm_silu, _contiguous),
    ]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`F.layer_norm` over the last dimension, then adaLN's modulation of each sample."""
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if scale is not None:
        y = y * (1 + _per_sample(scale, y))
    if shift is not None:
        y = y + _per_sample(shift, y)
    return y


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(values.shape[0], *[1] * (like.dim() - 2), values.shape[-1])


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """`F.rms_norm` over the last dimension."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


FAMILIES = {
    "group_norm_silu": Family(
        group_norm_silu, _group_norm_others, bundled=CASES["group_norm_silu"]
    ),
    "layer_norm": Family(
        layer_norm,
        lambda inputs: [compiled_variant("torch.compile", layer_norm)],
        bundled=CASES["layer_norm"],
    ),
    "rms_norm": Family(
        rms_norm,
        lambda inputs: [compiled_variant("torch.compile", rms_norm)],
        bundled=CASES["rms_norm"],
    ),
}
