"""LayerNorm over the last dimension, with the modulation per sample of adaptive LayerNorm.

    y = (x - mean) / sqrt(variance + eps) * weight + bias
    out = y * (1 + scale) + shift

Layout: `(N, ..., C)`, the last dimension dense. A row stays in a program's registers: one pass, a
read and a write of every element, which is what must move. Variance is taken about the mean. fp16,
bf16, fp32; computed in fp32 and rounded once. CUDA: Triton, sm_80 and later; CPU: C++, or the same
bits in PyTorch operations.

Sources: Ba, Kiros and Hinton, "Layer normalization" (https://arxiv.org/abs/1607.06450); Peebles and
Xie, "Scalable diffusion models with transformers" (https://arxiv.org/abs/2212.09748).
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

KERNEL = Kernel("layer_norm", module="layer_norm", plain=("rows", "inner", "of_sample"))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm and `* (1 + scale) + shift`, in fp32 with one rounding.

    Args:
        x: `(..., C)` with C up to 16384, fp16, bf16 or fp32; `(N, ..., C)` with scale or shift.
        weight: `(C,)`, or None for ones.
        bias: `(C,)`, or None for zeros.
        eps: added to the variance, positive.
        scale: `(N, C)`, or None for zeros.
        shift: `(N, C)`, or None for zeros.
        out: memory for the result (`_outs.py`); `x` itself, too.

    Returns:
        `(..., C)` of the same dtype: `out`, or contiguous.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, C is too large, `eps` is not positive or a
            gradient is required.
    """
    check_tensors({"x": x, "weight": weight, "bias": bias, "scale": scale, "shift": shift}, FLOATS)
    width = check_rows(x, eps)
    if weight is not None:
        check_shape("weight", weight, (width,))
    if bias is not None:
        check_shape("bias", bias, (width,))
    if scale is not None or shift is not None:
        name = "shift" if scale is None else "scale"
        if x.dim() < 2:
            raise ValueError(f"x: expected (N, ..., C) with {name}, got {tuple(x.shape)}")
        for name, of_sample in (("scale", scale), ("shift", shift)):
            if of_sample is not None:
                check_shape(name, of_sample, (x.shape[0], width))
    if out is not None:
        return OUT(x, weight, bias, eps, scale, shift, out)
    new: Tensor = torch.ops.heatsink.layer_norm(x, weight, bias, eps, scale, shift)
    return new


def key(x: Tensor, *_: object, **__: object) -> Key:
    """What the configuration depends on."""
    return {"width": x.shape[-1], "dtype": short(x.dtype)}


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The output, contiguous, and the launch that fills it."""
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, []
    grid = settled_grid(x)
    outer, inner, width = grid.shape
    scale, shift = settled_or_none(scale), settled_or_none(shift)
    launch = Launch(
        KERNEL,
        grid=(-(-outer * inner // config["BLOCK_R"]), 1, 1),
        args={
            "x_ptr": grid,
            "weight_ptr": settled_or_none(weight),
            "bias_ptr": settled_or_none(bias),
            "scale_ptr": scale,
            "shift_ptr": shift,
            "out_ptr": out,
            "rows": outer * inner,
            "inner": inner,
            "of_sample": x.shape[1:-1].numel(),
            "width": width,
            "stride_xo": grid.stride(0),
            "stride_xi": grid.stride(1),
            "stride_sn": 0 if scale is None else scale.stride(0),
            "stride_tn": 0 if shift is None else shift.stride(0),
            "eps": eps,
        },
        constants={"BLOCK_R": config["BLOCK_R"], "BLOCK_W": power_of_two(width)},
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _layer_norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    config = lookup("layer_norm", key(x), target_of(x.device))
    out, launches = plan(config, x, weight, bias, eps=eps, scale=scale, shift=shift, out=out)
    run(launches)
    return out


def _layer_norm_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    rows = x.float().reshape(-1, width)
    distance = rows - sum_rows(rows) / float(width)
    y = distance * inverse_root(sum_rows(distance * distance), width, eps)
    if weight is not None:
        y = y * weight.float()
    if bias is not None:
        y = y + bias.float()
    y = y.reshape(x.shape)
    per_sample = (x.shape[0], *(1 for _ in x.shape[1:-1]), width)
    if scale is not None:
        y = y * (1.0 + scale.float()).reshape(per_sample)
    if shift is not None:
        y = y + shift.float().reshape(per_sample)
    return y.to(x.dtype).contiguous()


def _layer_norm_fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? scale, Tensor? shift) -> Tensor"
)
OUT = Out("layer_norm", SCHEMA, even_rows)
torch.library.define("heatsink::layer_norm", SCHEMA)
torch.library.impl("heatsink::layer_norm", "default", _layer_norm_torch)
torch.library.impl("heatsink::layer_norm", "cuda", _layer_norm_triton)
torch.library.register_fake("heatsink::layer_norm", _layer_norm_fake)
OUT.define(_layer_norm_torch, _layer_norm_triton)
_native.load()


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, modulated: bool = False) -> Case:
    def make(device: torch.device) -> Inputs:
        samples, width = shape[0], shape[-1]
        x = normal(shape, dtype, device, seed=1)
        if modulated:
            both = normal((samples, 2 * width), dtype, device, seed=2)
            scale, shift = both.chunk(2, dim=1)
            return {"x": x, "scale": scale, "shift": shift, "eps": 1e-6}
        weight = normal((width,), dtype, device, seed=3)
        return {"x": x, "weight": weight, "bias": normal((width,), dtype, device, seed=4)}

    return Case(name, make)


OP = Op(
    name="layer_norm",
    public=layer_norm,
    kernels=(KERNEL,),
    cases=(
        _case("sd15-4096x320-fp16", (2, 4096, 320), torch.float16),
        _case("sdxl-4096x640-fp16", (2, 4096, 640), torch.float16),
        _case("sdxl-1024x1280-bf16", (2, 1024, 1280), torch.bfloat16),
        _case("sd15-256x1280-fp16", (2, 256, 1280), torch.float16),
        _case("text-77x768-fp16", (2, 77, 768), torch.float16),
        _case("adaln-4096x1152-bf16", (2, 4096, 1152), torch.bfloat16, modulated=True),
        _case("adaln-4608x3072-bf16", (1, 4608, 3072), torch.bfloat16, modulated=True),
        _case("bundled-64x128-fp32", (8, 64, 128), torch.float32),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK_R": r, "warps": n} for r in (1, 2, 4, 8) for n in (1, 2, 4, 8, 16)
    ],
)
