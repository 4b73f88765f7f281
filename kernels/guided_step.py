"""One denoising step of many rows: guidance, the scheduler's update and its noise in one launch.

    out    = uncond + guidance*(cond - uncond)       where a row is guided
    x0     = p*x + q*out
    x_next = A*x + B*x0 + C*x0_prev + D*noise

Each row has coefficients of its own (docs/schedule.md), so rows may be at different steps of
different schedules. Every product and sum is rounded by itself, in float32 and in the order
written; where C or D is 0 its term is left out, not multiplied; `noise` is that of docs/noise.md
for the purpose STEP. So every device gives the bits of `runtime/schedule.py` and
`runtime/noise.py`.

The next step's `s*x` is not made here: its scale belongs to a step that may not come, and the
network's rows are not these.

Layout: rows of any shape, `(R, C, h, w)` for latents; fp32, `out` also fp16 or bf16 and in
channels_last. CUDA: Triton, sm_80 and later; CPU: C++, or the PyTorch implementation here.

Sources: Ho and Salimans, "Classifier-free diffusion guidance" (https://arxiv.org/abs/2207.12598),
and those of docs/schedule.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels import noise as _noise
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Kernel, Launch, run
from heatsink.kernels._op import Case, Inputs, Op, normal
from heatsink.kernels._outs import check_memory

KERNEL = Kernel("guided_step", module="guided_step", plain=("out_rows", "tiles"), fusion=False)

COEFFICIENTS = 8
# What each row brings besides its sample, in the op's order.
VECTORS = ("coef", "guidance", "uncond", "cond", "seeds", "steps")
# docs/noise.md: fresh noise of a scheduler's step.
_STEP = 1


def guided_step(
    x: Tensor,
    out: Tensor,
    x0_prev: Tensor,
    coef: Tensor,
    guidance: Tensor,
    uncond: Tensor,
    cond: Tensor,
    seeds: Tensor,
    steps: Tensor,
    *,
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Advance every row by one step of its own schedule.

    Args:
        x: fp32 `(R, ...)`, the samples.
        out: fp16, bf16 or fp32 `(U, ...)`, the network's rows, in any order.
        x0_prev: fp32 `(R, ...)`, the x0 of each row's step before; read only where C is not 0.
        coef: fp32 `(R, 8)`: timestep, s, p, q, A, B, C, D.
        guidance: fp32 `(R,)`, read only where a row is guided.
        uncond: int32 `(R,)`, in [0, U): which row of `out` is the negative prompt's.
        cond: int32 `(R,)`: which is the prompt's. A row is guided if it is another.
        seeds: int64 `(R,)`, the bits of unsigned 64-bit numbers.
        steps: int64 `(R,)` in [0, 2^32), the requests' steps. Both are used only where D is not 0.

        results: memory for what is returned, contiguous, instead of new: then nothing is
            allocated on the CPU if all arguments are contiguous. The first may be `x` itself.

    Returns:
        `(x_next, x0)`, fp32 `(R, ...)`, contiguous.

    Raises:
        TypeError: if an argument is no tensor or its dtype is another.
        ValueError: if a shape or device is another, or a gradient is required.
        RuntimeError: on the CPU, if `uncond` or `cond` names no row of `out`. Elsewhere nothing
            can be raised, and such a row is NaN.
    """
    check_tensors(
        {"x": x, "x0_prev": x0_prev, "coef": coef, "guidance": guidance}, (torch.float32,)
    )
    check_tensors({"out": out}, FLOATS)
    check_tensors({"uncond": uncond, "cond": cond}, (torch.int32,))
    check_tensors({"seeds": seeds, "steps": steps}, (torch.int64,))
    for name, other in (("out", out), ("uncond", uncond), ("seeds", seeds)):
        if other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {other.device}")
    if x.dim() == 0 or out.dim() == 0:
        raise ValueError("x, out: expected (rows, ...), got a tensor without dimensions")
    rows = x.shape[0]
    check_shape("out", out, (out.shape[0], *x.shape[1:]))
    check_shape("x0_prev", x0_prev, tuple(x.shape))
    check_shape("coef", coef, (rows, COEFFICIENTS))
    vectors = (guidance, uncond, cond, seeds, steps)
    for name, vector in zip(VECTORS[1:], vectors, strict=True):
        check_shape(name, vector, (rows,))
    if results is not None:
        _check_results(x, *results)
        torch.ops.heatsink.guided_step_out(x, out, x0_prev, coef, *vectors, *results)
        return results
    x_next, x0 = torch.ops.heatsink.guided_step(x, out, x0_prev, coef, *vectors)
    return x_next, x0


def _check_results(x: Tensor, x_next: Tensor, x0: Tensor) -> None:
    for name, result in (("x_next", x_next), ("x0", x0)):
        check_tensors({"x": x, name: result}, (torch.float32,))
        check_shape(name, result, tuple(x.shape))
        if not result.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {result.stride()}")


def key(x: Tensor, **others: Tensor) -> Key:
    """What the configuration depends on."""
    return {"count": x.shape[1:].numel()}


def _row_contiguous(x: Tensor) -> bool:
    return x.numel() == 0 or x[0].is_contiguous()


def _channels_inside(x: Tensor) -> bool:
    """Whether a row is dense with its first dimension innermost, as in channels_last."""
    return x.dim() >= 3 and x.numel() > 0 and x[0].movedim(0, -1).is_contiguous()


def plan(
    config: Config,
    x: Tensor,
    out: Tensor,
    x0_prev: Tensor,
    *,
    results: tuple[Tensor, Tensor] | None = None,
    **vectors: Tensor,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The outputs and the launch that fills them; `vectors` are those of `VECTORS`."""
    if results is None:
        results = _guided_step_fake(x)
    rows, count = x.shape[0], x.shape[1:].numel()
    x, x0_prev = (t if _row_contiguous(t) else t.contiguous() for t in (x, x0_prev))
    inside = not _row_contiguous(out) and _channels_inside(out)
    out = out if inside or _row_contiguous(out) else out.contiguous()
    tiles = -(-count // (4 * config["BLOCK"]))
    launch = Launch(
        KERNEL,
        grid=(rows * tiles, 1, 1),
        args={
            "x_ptr": x,
            "out_ptr": out,
            "x0_prev_ptr": x0_prev,
            **{f"{name}_ptr": vectors[name].contiguous() for name in VECTORS},
            "x_next_ptr": results[0],
            "x0_ptr": results[1],
            "out_rows": out.shape[0],
            "count": count,
            "tiles": tiles,
            "channels": out.shape[1] if inside else 1,
            "stride_xr": x.stride(0),
            "stride_or": out.stride(0),
            "stride_pr": x0_prev.stride(0),
        },
        constants={"PURPOSE": _STEP, "CHANNELS_INSIDE": inside, "BLOCK": config["BLOCK"]},
        warps=config["warps"],
        stages=1,
    )
    return results, [launch]


def _guided_step_triton(
    x: Tensor,
    out: Tensor,
    x0_prev: Tensor,
    *vectors: Tensor,
    results: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    config = lookup("guided_step", key(x), target_of(x.device))
    named = dict(zip(VECTORS, vectors, strict=True))
    results, launches = plan(config, x, out, x0_prev, results=results, **named)
    run(launches)
    return results


def _guided_step_torch(
    x: Tensor,
    out: Tensor,
    x0_prev: Tensor,
    coef: Tensor,
    guidance: Tensor,
    uncond: Tensor,
    cond: Tensor,
    seeds: Tensor,
    steps: Tensor,
) -> tuple[Tensor, Tensor]:
    for name, chosen in (("uncond", uncond), ("cond", cond)):
        for row in chosen.tolist():
            if not 0 <= row < out.shape[0]:
                raise RuntimeError(
                    f"{name}: expected rows of out, 0 to {out.shape[0] - 1}, got {row}"
                )

    def spread(values: Tensor) -> Tensor:
        return values.reshape(-1, *(1,) * (x.dim() - 1))

    low, high = out[uncond.long()].float(), out[cond.long()].float()
    guided = low + spread(guidance) * (high - low)
    chosen_out = torch.where(spread(uncond != cond), guided, high)
    _, _, p, q, a, b, c, d = (spread(column) for column in coef.unbind(1))
    x0 = p * x + q * chosen_out
    x_next = a * x + b * x0
    x_next = torch.where(c != 0, x_next + c * x0_prev, x_next)
    if bool((d != 0).any()):
        noise = _noise.normal(seeds, steps, _STEP, x.shape[1:].numel()).view(x.shape)
        x_next = torch.where(d != 0, x_next + d * noise, x_next)
    return x_next.contiguous(), x0.contiguous()


def _guided_step_fake(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
        torch.empty(x.shape, dtype=x.dtype, device=x.device),
    )


def _check_memory(*given: Tensor) -> None:
    *args, x_next, x0 = given
    _check_results(args[0], x_next, x0)
    check_memory("x_next", x_next, args, in_place=1)
    check_memory("x0", x0, [*args, x_next], in_place=0)


def _guided_step_out_torch(*given: Tensor) -> None:
    _check_memory(*given)
    for result, value in zip(given[-2:], _guided_step_torch(*given[:-2]), strict=True):
        result.copy_(value)


def _guided_step_out_triton(*given: Tensor) -> None:
    _check_memory(*given)
    x, out, x0_prev, *vectors = given[:-2]
    _guided_step_triton(x, out, x0_prev, *vectors, results=(given[-2], given[-1]))


def _guided_step_out_fake(*given: Tensor) -> None:
    _check_results(given[0], *given[-2:])


_ARGUMENTS = (
    "Tensor x, Tensor out, Tensor x0_prev, Tensor coef, Tensor guidance, Tensor uncond, "
    "Tensor cond, Tensor seeds, Tensor steps"
)
torch.library.define("heatsink::guided_step", f"({_ARGUMENTS}) -> (Tensor x_next, Tensor x0)")
torch.library.define(
    "heatsink::guided_step_out", f"({_ARGUMENTS}, Tensor(a!) x_next, Tensor(b!) x0) -> ()"
)
torch.library.impl("heatsink::guided_step", "default", _guided_step_torch)
torch.library.impl("heatsink::guided_step", "cuda", _guided_step_triton)
torch.library.register_fake("heatsink::guided_step", _guided_step_fake)
torch.library.impl("heatsink::guided_step_out", "default", _guided_step_out_torch)
torch.library.impl("heatsink::guided_step_out", "cuda", _guided_step_out_triton)
torch.library.register_fake("heatsink::guided_step_out", _guided_step_out_fake)
_native.load()


def _case(name: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """Rows with guidance, history and noise: all that a step can need."""

    def make(device: torch.device) -> Inputs:
        index = torch.arange(rows, dtype=torch.int32, device=device)
        return {
            "x": normal((rows, *shape), torch.float32, device, seed=1),
            "out": normal((2 * rows, *shape), dtype, device, seed=2),
            "x0_prev": normal((rows, *shape), torch.float32, device, seed=3),
            "coef": normal((rows, COEFFICIENTS), torch.float32, device, seed=4),
            "guidance": normal((rows,), torch.float32, device, seed=5),
            "uncond": 2 * index,
            "cond": 2 * index + 1,
            "seeds": index.long(),
            "steps": index.long(),
        }

    return Case(name, make)


OP = Op(
    name="guided_step",
    public=guided_step,
    kernels=(KERNEL,),
    cases=(
        _case("sdxl-8x4x128x128-fp16", 8, (4, 128, 128), torch.float16),
        _case("sd15-8x4x64x64-fp16", 8, (4, 64, 64), torch.float16),
        _case("bundled-12x8x8x8-fp32", 12, (8, 8, 8), torch.float32),
    ),
    key=key,
    plan=plan,
    space=lambda key, arch: [
        {"BLOCK": block, "warps": warps} for block in (32, 64, 128, 256) for warps in (1, 2, 4)
    ],
)
