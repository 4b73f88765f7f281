"""The gated activation of diffusion transformers' feed-forward: `hidden * gelu(gate)`.

    hidden, gate = x.chunk(2, dim=-1)      as diffusers' GEGLU orders them
    out = hidden * gate * Phi(gate)        the exact GELU, Phi the normal distribution function

Layout: `(..., 2 W)` to `(..., W)`; rows may be views of something larger. One pass: two reads and a
write an element. fp16, bf16, fp32; computed in fp32 and rounded once. CUDA: Triton, sm_80 and
later; CPU: C++, or the PyTorch implementation here with the same bits.

Source: Shazeer, "GLU variants improve transformer" (https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_tensors
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._gelu import gelu
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels._outs import Out, even_rows
from heatsink.kernels.silu_mul import as_rows

KERNEL = Kernel("geglu", module="geglu", plain=("rows",))


def geglu(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`x[..., :W] * gelu(x[..., W:])`, in fp32 with one rounding.

    Args:
        x: `(..., 2 W)`, fp16, bf16 or fp32.
        out: memory for the result (`_outs.py`); `x[..., :W]` itself, too.

    Returns:
        `(..., W)` of the same dtype: `out`, or contiguous.

    Raises:
        TypeError: if `x` is no tensor or has another dtype.
        ValueError: if the last dimension is missing or odd, or a gradient is required.
    """
    check_tensors({"x": x}, FLOATS)
    shape = x.shape
    if not shape or shape[-1] % 2:
        raise ValueError(f"x: expected (..., 2 W), got {tuple(shape)}")
    if out is not None:
        return OUT(x, out)
    new: Tensor = torch.ops.heatsink.geglu(x)
    return new


def key(x: Tensor) -> Key:
    """What the configuration depends on."""
    return {"width": x.shape[-1] // 2}


def plan(config: Config, x: Tensor, out: Tensor | None = None) -> tuple[Tensor, list[Launch]]:
    """The output, whose rows lie at one distance, and the launch that fills it."""
    if out is None:
        out = _geglu_fake(x)
    xs, outs = as_rows(x), as_rows(out)
    rows, width = outs.shape
    block_r, block_w = config["BLOCK_R"], config["BLOCK_W"]
    launch = Launch(
        KERNEL,
        # Along x alone: y ends at 65,535.
        grid=(-(-rows // block_r) * -(-width // block_w), 1, 1),
        args={
            "x_ptr": xs,
            "out_ptr": outs,
            "rows": rows,
            "width": width,
            "stride_xr": xs.stride(0),
            "stride_or": outs.stride(0),
        },
        constants={"BLOCK_R": block_r, "BLOCK_W": block_w},
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _geglu_triton(x: Tensor, out: Tensor | None = None) -> Tensor:
    out, launches = plan(lookup("geglu", key(x), target_of(x.device)), x, out)
    run(launches)
    return out


def _geglu_torch(x: Tensor) -> Tensor:
    hidden, gate = x.float().chunk(2, dim=-1)
    return (hidden * gelu(gate)).to(x.dtype).contiguous()


def _geglu_fake(x: Tensor) -> Tensor:
    return x.new_empty(_halved(x))


def _halved(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2)


SCHEMA = "(Tensor x) -> Tensor"
OUT = Out("geglu", SCHEMA, even_rows, whole=even_rows, shape=_halved)
torch.library.define("heatsink::geglu", SCHEMA)
torch.library.impl("heatsink::geglu", "default", _geglu_torch)
torch.library.impl("heatsink::geglu", "cuda", _geglu_triton)
torch.library.register_fake("heatsink::geglu", _geglu_fake)
OUT.define(_geglu_torch, _geglu_triton)
_native.load()


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        return {"x": normal(shape, dtype, device, seed=1)}

    return Case(name, make)


OP = Op(
    name="geglu",
    public=geglu,
    kernels=(KERNEL,),
    cases=(
        _case("sdxl-1024x5120-fp16", (2, 1024, 2 * 5120), torch.float16),
        _case("sdxl-4096x2560-fp16", (2, 4096, 2 * 2560), torch.float16),
        _case("sd15-4096x1280-bf16", (2, 4096, 2 * 1280), torch.bfloat16),
        _case("sd15-4096x1280-fp16", (2, 4096, 2 * 1280), torch.float16),
        _case("sd15-1024x2560-fp16", (2, 1024, 2 * 2560), torch.float16),
        _case("bundled-64x256-fp32", (2, 64, 2 * 256), torch.float32),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK_R": r, "BLOCK_W": w, "warps": n}
        for r in (1, 2, 4)
        for w in (512, 1024, 2048)
        for n in (4, 8)
    ],
)
