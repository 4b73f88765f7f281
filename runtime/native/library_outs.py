"""Products and convolutions of PyTorch's CUDA libraries, written where they belong.

`addmm.out` and `mm.out` (cuBLAS) and `cudnn_convolution.out` write into memory that is given;
`convolution.out` does not: ATen generates it, allocates a result and copies it. What follows a
product is computed in place, with the bits of `heatsink::linear` and `heatsink::conv2d` on CUDA:
their epilogue is fp32 and rounded once, so in a narrower dtype one term may follow, and no more.
What is refused here (None) runs unplanned, inside a CUDA graph from its pool.

Unmeasured, never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Step = Callable[[], Any]
aten = torch.ops.aten

_IN_PLACE: dict[str, Any] = {
    "silu": aten.silu.out,
    "gelu": aten.gelu.out,
    "gelu_tanh": partial(aten.gelu.out, approximate="tanh"),
}
# A kernel in channels_last memory, as cuDNN wants it beside such images; kept with its weight.
_KERNELS: Any = WeakIdKeyDictionary()


def linear_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    out: Tensor,
) -> Step | None:
    """`heatsink::linear` into `out`; None where no operator writes it there."""
    rest = _epilogue(sample_add, -1, activation, residual, out)
    if rest is None or x.numel() == 0 or not (x.is_contiguous() and out.is_contiguous()):
        return None
    rows, into = x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        return _sequence(partial(torch.mm, rows, weight.t(), out=into), rest)
    return _sequence(partial(torch.addmm, bias, rows, weight.t(), out=into), rest)


def conv2d_step(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    stride: int,
    padding: int,
    upsample: int,
    activation: str,
    out: Tensor,
) -> Step | None:
    """`heatsink::conv2d` into `out`; None where no operator writes it there."""
    rest = _epilogue(sample_add, 1, activation, residual, out)
    images = all(v.is_contiguous(memory_format=torch.channels_last) for v in (x, out))
    if rest is None or not images or x2 is not None or upsample != 1 or x.numel() == 0:
        return None
    cudnn = torch.backends.cudnn
    if not (cudnn.is_available() and cudnn.enabled):
        return None
    settings = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    window = ([padding] * 2, [stride] * 2, [1, 1], 1)
    product = partial(aten.cudnn_convolution.out, x, _kernel(weight), *window, *settings, out=out)
    if bias is not None:
        # PyTorch's convolution adds it after rounding, too.
        rest = [partial(torch.add, out, bias.view(1, -1, 1, 1), out=out), *rest]
    return _sequence(product, rest)


def _epilogue(
    sample_add: Tensor | None, dim: int, activation: str, residual: Tensor | None, out: Tensor
) -> list[Step] | None:
    """What follows a product in `out`, in place; None where that would round in between."""
    if activation and activation not in _IN_PLACE:
        return None
    steps: list[Step] = []
    if sample_add is not None:
        shape = [1] * out.dim()
        shape[0], shape[dim] = sample_add.shape
        steps.append(partial(torch.add, out, sample_add.view(shape), out=out))
    if activation:
        steps.append(partial(_IN_PLACE[activation], out, out=out))
    if residual is not None:
        steps.append(partial(torch.add, out, residual, out=out))
    return None if len(steps) > 1 and out.dtype != torch.float32 else steps


def _kernel(weight: Tensor) -> Tensor:
    found = _KERNELS.get(weight)
    if found is None:
        found = weight.contiguous(memory_format=torch.channels_last)
        # What is its own key would keep itself.
        if found is not weight:
            _KERNELS[weight] = found
    kernel: Tensor = found
    return kernel


def forget_kernel(weight: Tensor) -> None:
    """Lay a weight out anew when it is next used: it was written to."""
    _KERNELS.pop(weight, None)


def _sequence(first: Step, rest: list[Step]) -> Step:
    if not rest:
        return first

    def run() -> None:
        first()
        for step in rest:
            step()

    return run
