"""RMSNorm over the last dimension.

    out = x / sqrt(mean(x^2) + eps) * weight

Layout: `(..., C)`, the last dimension dense; the leading ones need not be, so that queries and keys
are normalised where they lie in a packed projection. A row stays in a program's registers, several
rows where they are short: one pass, a read and a write of every element, which is what must move.
fp16, bf16, fp32; computed in fp32 and rounded once. CUDA: Triton, sm_80 and later; CPU: C++, or the
same bits in PyTorch operations.

Source: Zhang and Sennrich, "Root mean square layer normalization"
(https://arxiv.org/abs/1910.07467).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels._outs import Out, even_rows
from heatsink.kernels._rows import (
    check_rows,
    inverse_root,
    power_of_two,
    settled_grid,
    settled_or_none,
    sum_rows,
)

KERNEL = Kernel("rms_norm", module="rms_norm", plain=("rows", "inner"))


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, out: Tensor | None = None
) -> Tensor:
    """RMSNorm in fp32 with one rounding.

    Args:
        x: `(..., C)` with C up to 16384, fp16, bf16 or fp32.
        weight: `(C,)`, or None for ones.
        eps: added to the mean square, positive.
        out: memory for the result (`_outs.py`); `x` itself, too.

    Returns:
        `(..., C)` of the same dtype: `out`, or contiguous.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, C is too large, `eps` is not positive or a
            gradient is required.
    """
    check_tensors({"x": x, "weight": weight}, FLOATS)
    width = check_rows(x, eps)
    if weight is not None:
        check_shape("weight", weight, (width,))
    if out is not None:
        return OUT(x, weight, eps, out)
    new: Tensor = torch.ops.heatsink.rms_norm(x, weight, eps)
    return new


def key(x: Tensor, *_: object, **__: object) -> Key:
    """What the configuration depends on."""
    return {"width": x.shape[-1], "dtype": short(x.dtype)}


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The output, contiguous, and the launch that fills it."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, []
    grid = settled_grid(x)
    outer, inner, width = grid.shape
    launch = Launch(
        KERNEL,
        grid=(-(-outer * inner // config["BLOCK_R"]), 1, 1),
        args={
            "x_ptr": grid,
            "weight_ptr": settled_or_none(weight),
            "out_ptr": out,
            "rows": outer * inner,
            "inner": inner,
            "width": width,
            "stride_xo": grid.stride(0),
            "stride_xi": grid.stride(1),
            "eps": eps,
        },
        constants={"BLOCK_R": config["BLOCK_R"], "BLOCK_W": power_of_two(width)},
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _rms_norm_triton(
    x: Tensor, weight: Tensor | None, eps: float, out: Tensor | None = None
) -> Tensor:
    config = lookup("rms_norm", key(x), target_of(x.device))
    out, launches = plan(config, x, weight, eps=eps, out=out)
    run(launches)
    return out


def _rms_norm_torch(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.float().reshape(-1, width)
    y = rows * inverse_root(sum_rows(rows * rows), width, eps)
    if weight is not None:
        y = y * weight.float()
    return y.to(x.dtype).reshape(x.shape).contiguous()


def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


SCHEMA = "(Tensor x, Tensor? weight, float eps) -> Tensor"
OUT = Out("rms_norm", SCHEMA, even_rows)
torch.library.define("heatsink::rms_norm", SCHEMA)
torch.library.impl("heatsink::rms_norm", "default", _rms_norm_torch)
torch.library.impl("heatsink::rms_norm", "cuda", _rms_norm_triton)
torch.library.register_fake("heatsink::rms_norm", _rms_norm_fake)
OUT.define(_rms_norm_torch, _rms_norm_triton)
_native.load()


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool = False) -> Case:
    def make(device: torch.device) -> Inputs:
        weight = normal((shape[-1],), dtype, device, seed=2)
        if packed:
            batch, tokens, heads, width = shape
            projection = normal((batch, tokens, 3, heads, width), dtype, device, seed=1)
            return {"x": projection[:, :, 0], "weight": weight}
        return {"x": normal(shape, dtype, device, seed=1), "weight": weight}

    return Case(name, make)


OP = Op(
    name="rms_norm",
    public=rms_norm,
    kernels=(KERNEL,),
    cases=(
        _case("queries-4608x24x128-bf16", (1, 4608, 24, 128), torch.bfloat16, packed=True),
        _case("queries-4096x24x64-bf16", (2, 4096, 24, 64), torch.bfloat16, packed=True),
        _case("rows-2048x4096-bf16", (2048, 4096), torch.bfloat16),
        _case("text-77x2048-fp16", (2, 77, 2048), torch.float16),
        _case("small-64x64-fp32", (8, 64, 64), torch.float32),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK_R": r, "warps": n} for r in (1, 4, 8, 16, 32) for n in (1, 2, 4, 8, 16)
    ],
)
