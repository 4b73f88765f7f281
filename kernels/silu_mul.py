"""The gated activation of SwiGLU: `silu(gate) * up`, `silu(x) = x / (1 + exp(-x))`.

Layout: `(..., W)`; rows may be views of a packed projection. One pass: two reads and a write an
element. fp16, bf16, fp32; computed in fp32 and rounded once. CUDA: Triton, sm_80 and later; CPU:
C++, or the PyTorch implementation here with the same bits.

Source: Shazeer, "GLU variants improve transformer" (https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._exp import exp
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels._outs import Out, even_rows

KERNEL = Kernel("silu_mul", module="silu_mul", plain=("rows",))


def silu_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, in fp32 with one rounding.

    Args:
        gate: `(..., W)`, fp16, bf16 or fp32.
        up: like `gate`.
        out: memory for the result (`_outs.py`); `gate` or `up` itself, too.

    Returns:
        `(..., W)` of the same dtype: `out`, or contiguous.

    Raises:
        TypeError: if an argument is no tensor or its dtype is another.
        ValueError: if shapes or devices differ, a gradient is required or there is no dimension.
    """
    check_tensors({"gate": gate, "up": up}, FLOATS)
    shape = gate.shape
    if not shape:
        raise ValueError("gate: expected (..., W), got a tensor without dimensions")
    check_shape("up", up, shape)
    if out is not None:
        return OUT(gate, up, out)
    new: Tensor = torch.ops.heatsink.silu_mul(gate, up)
    return new


def as_rows(x: Tensor) -> Tensor:
    """`(..., W)` as `(rows, W)` whose last dimension is dense; a copy only where it must be."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def key(gate: Tensor, up: Tensor) -> Key:
    """What the configuration depends on."""
    return {"width": gate.shape[-1]}


def plan(
    config: Config, gate: Tensor, up: Tensor, out: Tensor | None = None
) -> tuple[Tensor, list[Launch]]:
    """The output, whose rows lie at one distance, and the launch that fills it."""
    if out is None:
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups, outs = as_rows(gate), as_rows(up), as_rows(out)
    rows, width = gates.shape
    block_r, block_w = config["BLOCK_R"], config["BLOCK_W"]
    launch = Launch(
        KERNEL,
        # Along x alone: y ends at 65,535.
        grid=(-(-rows // block_r) * -(-width // block_w), 1, 1),
        args={
            "gate_ptr": gates,
            "up_ptr": ups,
            "out_ptr": outs,
            "rows": rows,
            "width": width,
            "stride_gr": gates.stride(0),
            "stride_ur": ups.stride(0),
            "stride_or": outs.stride(0),
        },
        constants={"BLOCK_R": block_r, "BLOCK_W": block_w},
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _silu_mul_triton(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
    config = lookup("silu_mul", key(gate, up), target_of(gate.device))
    out, launches = plan(config, gate, up, out)
    run(launches)
    return out


def _silu_mul_torch(gate: Tensor, up: Tensor) -> Tensor:
    # Not ATen's silu: its bits on the CPU depend on where in a loop an element falls.
    wide = gate.float()
    out = wide / (1.0 + exp(-wide)) * up.float()
    return out.to(gate.dtype).contiguous()


def _silu_mul_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


SCHEMA = "(Tensor gate, Tensor up) -> Tensor"
OUT = Out("silu_mul", SCHEMA, even_rows, whole=even_rows, in_place=2)
torch.library.define("heatsink::silu_mul", SCHEMA)
torch.library.impl("heatsink::silu_mul", "default", _silu_mul_torch)
torch.library.impl("heatsink::silu_mul", "cuda", _silu_mul_triton)
torch.library.register_fake("heatsink::silu_mul", _silu_mul_fake)
OUT.define(_silu_mul_torch, _silu_mul_triton)
_native.load()


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> Inputs:
        packed = normal((*shape[:-1], 2 * shape[-1]), dtype, device, seed=1)
        gate, up = packed.chunk(2, dim=-1)
        return {"gate": gate, "up": up}

    return Case(name, make)


OP = Op(
    name="silu_mul",
    public=silu_mul,
    kernels=(KERNEL,),
    cases=(
        _case("transformer-4096x5632-bf16", (2, 4096, 5632), torch.bfloat16),
        _case("ragged-333x1000-fp16", (3, 111, 1000), torch.float16),
        _case("small-77x768-fp32", (2, 77, 768), torch.float32),
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
