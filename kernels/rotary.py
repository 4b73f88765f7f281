"""Rotary position embedding: pairs of channels turned by an angle of their position.

    (a, b) -> (a*cos - b*sin, b*cos + a*sin)      for each pair of a head's channels

`interleaved`: the pairs are channels (0, 1), (2, 3), ... as in FLUX; otherwise (0, D/2),
(1, D/2 + 1), ... as in GPT-NeoX. Layout: `(B, S, H, D)`, any strides, so that a packed QKV
projection needs no copy. One pass: a read and a write an element. fp16, bf16, fp32; computed in
fp32 and rounded once. CUDA: Triton, sm_80 and later; elsewhere PyTorch.

Source: Su et al., "RoFormer" (https://arxiv.org/abs/2104.09864), equation 34.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels._checks import FLOATS, check_shape, check_tensors
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal

KERNEL = Kernel("rotary", module="rotary", plain=("seq_len",))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn every pair of channels by its position's angle, in fp32 with one rounding.

    Args:
        x: `(B, S, H, D)`, D even, fp16, bf16 or fp32, any strides.
        cos: `(S, D/2)` or `(B, S, D/2)`, fp32: the cosine of each pair's angle.
        sin: like `cos`: the sine.
        interleaved: whether neighbours are pairs, or a channel and that half a head away.

    Returns:
        `(B, S, H, D)`, contiguous, of `x`'s dtype.

    Raises:
        TypeError: if an argument is no tensor or its dtype is another.
        ValueError: if a shape or device is another, or a gradient is required.
    """
    check_tensors({"x": x}, FLOATS)
    check_tensors({"cos": cos, "sin": sin}, (torch.float32,))
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x: expected (B, S, H, D) with D even, got {tuple(x.shape)}")
    if cos.device != x.device:
        raise ValueError(f"cos: expected device {x.device} like x, got {cos.device}")
    batch, seq_len, _, head_dim = x.shape
    rows = (batch,) if cos.dim() == 3 else ()
    check_shape("cos", cos, (*rows, seq_len, head_dim // 2))
    check_shape("sin", sin, tuple(cos.shape))
    out: Tensor = torch.ops.heatsink.rotary(x, cos, sin, interleaved)
    return out


def key(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Key:
    """What the configuration depends on."""
    return {"heads": x.shape[2], "head_dim": x.shape[3], "interleaved": int(interleaved)}


def plan(
    config: Config, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, list[Launch]]:
    """The output and the launch that fills it."""
    out = _rotary_fake(x, cos, sin, interleaved)
    batch, seq_len, heads, head_dim = x.shape
    if cos.dim() == 2:
        # Shared by the samples: a stride of 0 between them.
        cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    block_h = config["BLOCK_H"]
    launch = Launch(
        KERNEL,
        grid=(batch * seq_len if head_dim else 0, -(-heads // block_h), 1),
        args={
            "x_ptr": x,
            "cos_ptr": cos,
            "sin_ptr": sin,
            "out_ptr": out,
            "seq_len": seq_len,
            "heads": heads,
            "head_dim": head_dim,
            **_strides("x", x, "bshd"),
            **_strides("c", cos, "bsd"),
            **_strides("s", sin, "bsd"),
        },
        constants={
            "INTERLEAVED": interleaved,
            "BLOCK_H": block_h,
            "BLOCK_D": max(2, 1 << max(head_dim - 1, 0).bit_length()),
        },
        warps=config["warps"],
        stages=1,
    )
    return out, [launch]


def _strides(name: str, x: Tensor, axes: str) -> dict[str, int]:
    return {f"stride_{name}{axis}": x.stride(i) for i, axis in enumerate(axes)}


def _rotary_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    config = lookup("rotary", key(x, cos, sin, interleaved), target_of(x.device))
    out, launches = plan(config, x, cos, sin, interleaved)
    run(launches)
    return out


def _rotary_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    wide = x.float()
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    # `cat` keeps the order of its inputs' strides.
    return out.to(x.dtype).contiguous()


def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


torch.library.define(
    "heatsink::rotary", "(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor"
)
torch.library.impl("heatsink::rotary", "default", _rotary_torch)
torch.library.impl("heatsink::rotary", "cuda", _rotary_triton)
torch.library.register_fake("heatsink::rotary", _rotary_fake)


def _case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, interleaved: bool
) -> Case:
    def make(device: torch.device) -> Inputs:
        batch, seq_len, heads, head_dim = shape
        packed = normal((batch, seq_len, 3, heads, head_dim), dtype, device, seed=1)
        angles = normal((seq_len, head_dim // 2), torch.float32, device, seed=2)
        cos, sin = angles.cos(), angles.sin()
        return {"x": packed[:, :, 0], "cos": cos, "sin": sin, "interleaved": interleaved}

    return Case(name, make)


OP = Op(
    name="rotary",
    public=rotary,
    kernels=(KERNEL,),
    cases=(
        _case("flux-4608x24x128-bf16", (1, 4608, 24, 128), torch.bfloat16, True),
        _case("flux-4096x24x128-bf16", (2, 4096, 24, 128), torch.bfloat16, True),
        _case("neox-1024x16x80-fp16", (2, 1024, 16, 80), torch.float16, False),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK_H": h, "warps": n} for h in (1, 2, 4, 8, 16, 32) for n in (1, 2, 4, 8)
    ],
)
