"""What `group_norm_silu`, `layer_norm` and `rms_norm` are measured against: PyTorch's own.

Images of `group_norm_silu` are `(N, H, W, C)`; PyTorch gets them as channels_last, which is the
same memory, and as NCHW, copied before anything is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def _images(inputs: Inputs, *, contiguous: bool) -> Inputs:
    x = inputs["x"].movedim(-1, 1)
    return {**inputs, "x": x.contiguous() if contiguous else x}


def _back(out: Any) -> Any:
    return out.movedim(1, -1)


def _channels_first(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    per_sample = (slice(None), slice(None), *[None] * (x.dim() - 2))
    if scale is not None:
        y = y * (1 + scale[per_sample])
    if shift is not None:
        y = y + shift[per_sample]
    return F.silu(y) if silu else y


def group_norm_silu(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """`F.group_norm`, the modulation and `F.silu` on `(N, ..., C)` seen as channels_last."""
    out: Tensor = _back(_channels_first(x.movedim(-1, 1), *args, **options))
    return out


def _group_norm_others(inputs: Inputs) -> Sequence[Variant | LeftOut]:
    def contiguous(values: Inputs) -> Inputs:
        return _images(values, contiguous=True)

    def channels_last(values: Inputs) -> Inputs:
        return _images(values, contiguous=False)

    def prepare(values: Inputs) -> Any:
        changed = contiguous(values)
        return lambda: _channels_first(**changed)

    return [
        Variant("PyTorch eager, NCHW", prepare, _back),
        compiled_variant("torch.compile", _channels_first, channels_last, _back),
        compiled_variant("torch.compile, NCHW", _channels_first, contiguous, _back),
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
