"""Adapters by row: what LoRAs add to a layer's output, each row with adapters of its own.

    y[r] += sum over n of scales[r, n] * B[slots[r, n]] (A[slots[r, n]] x[r])

over the n whose slot is not negative; `y` is changed in place. A linear layer or a convolution, of
which A is the one that strides and pads, and B takes each pixel by itself. A row without adapters
keeps `y` bit by bit. A row's bits depend on that row, its adapters' values, true ranks and scales
in their order; not on the other rows, on trailing slots of -1, or on the bank's size and rank.

fp16, bf16, fp32. Sums in fp32, one rounding of `y`. CUDA (Triton, sm_80 and later): `scale * A x`
is rounded to the dtype before the second product, as tensor cores want it; so in fp16 it must stay
below 65,504. CPU: it stays in fp32; C++, or PyTorch operations, which give other last bits.

Bytes: x read once for 64 ranks (again, from the L2 cache, for more of them and for more adapters),
y read and written once; A and B come from the L2 cache. Launches: one where a tile of tokens is
worth a program that makes it from x to y, else two with `h` between them; which, a configuration
says, by a row's dimensions.

Sources: Hu et al., "LoRA" (https://arxiv.org/abs/2106.09685); Chen et al., "Punica: multi-tenant
LoRA serving" (https://arxiv.org/abs/2310.18547).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors, short
from heatsink.kernels._config import Config, Key, lookup, target_of
from heatsink.kernels._launch import Launch, run
from heatsink.kernels._lora_rows_cases import CASES, SMOKE
from heatsink.kernels._lora_rows_plan import EXPAND, FUSED, SHRINK, plan_rows, tokens_of
from heatsink.kernels._lora_rows_space import space
from heatsink.kernels._lora_rows_torch import lora_rows_torch
from heatsink.kernels._op import Op
from heatsink.kernels._windows import Pair, Window, as_pair


def lora_rows(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> None:
    """Add to each row of `y` what its adapters make of its row of `x`.

    Args:
        y: `(R, ..., out)`, or `(R, out, H', W')` of a convolution; fp16, bf16 or fp32; changed. It
            shares no memory with the others.
        x: `(R, ..., in)`, or `(R, in, H, W)`; of y's dtype, as `a` and `b`.
        a: `(S, rank, in)`, or `(S, rank, in, kh, kw)`: every slot's A. Fastest with `in` dense.
        b: `(S, rank, out)`: every slot's B, transposed.
        slots: int32 or int64 `(R, n)`: each row's adapters; negative is none.
        scales: fp32 `(R, n)`: what each is multiplied by; ignored where there is none.
        ranks: int32 `(S,)`: a slot's true rank, `rank` at most; the rest of `a` and `b` is not
            read. By default `rank`.
        stride: of the convolution, one number or (height, width).
        padding: zeros on each side.
        dilation: between taps.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, y overlaps itself or a gradient is required.
        RuntimeError: on the CPU, if a slot is none of the bank's. Elsewhere nothing can be raised
            without waiting for the device: such a row of `y` becomes NaN.
    """
    check_tensors({"y": y, "x": x, "a": a, "b": b}, FLOATS)
    check_tensors({"slots": slots}, (torch.int32, torch.int64))
    check_tensors({"scales": scales}, (torch.float32,))
    if ranks is not None:
        check_tensors({"ranks": ranks}, (torch.int32,))
    for name, other in (("slots", slots), ("scales", scales), ("ranks", ranks)):
        if other is not None and other.device != y.device:
            raise ValueError(f"{name}: expected device {y.device} like y, got {other.device}")
    window = _check_shapes(y, x, a, b, stride, padding, dilation)
    rows = x.shape[0]
    if slots.dim() != 2 or slots.shape[0] != rows:
        raise ValueError(f"slots: expected shape ({rows}, n), got {tuple(slots.shape)}")
    check_shape("scales", scales, tuple(slots.shape))
    if ranks is not None:
        check_shape("ranks", ranks, (a.shape[0],))
    if y.numel() == 0 or slots.numel() == 0 or a.shape[1:].numel() == 0:
        return
    geometry = (*window.stride, *window.padding, *window.dilation)
    torch.ops.heatsink.lora_rows(y, x, a, b, slots, scales, ranks, *geometry)


def _check_shapes(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    stride: int | Pair,
    padding: int | Pair,
    dilation: int | Pair,
) -> Window:
    if a.dim() not in (3, 5):
        raise ValueError(
            f"a: expected (S, rank, in) or (S, rank, in, kh, kw), got {tuple(a.shape)}"
        )
    check_shape("b", b, (*a.shape[:2], b.shape[-1] if b.dim() else 0))
    outputs = b.shape[2]
    window = Window(
        (a.shape[3], a.shape[4]) if a.dim() == 5 else (1, 1),
        as_pair("stride", stride, 1),
        as_pair("padding", padding, 0),
        as_pair("dilation", dilation, 1),
    )
    if a.dim() == 3:
        if window != Window():
            raise ValueError("stride, padding, dilation: expected none for a linear layer's a")
        if x.dim() < 2 or x.shape[-1] != a.shape[2]:
            raise ValueError(f"x: expected (R, ..., {a.shape[2]}), got {tuple(x.shape)}")
        check_shape("y", y, (*x.shape[:-1], outputs))
    else:
        if x.dim() != 4 or x.shape[1] != a.shape[2]:
            raise ValueError(f"x: expected (R, {a.shape[2]}, H, W), got {tuple(x.shape)}")
        high, wide = window.outputs(x.shape[2], x.shape[3])
        if min(*window.kernel, high, wide) < 1:
            raise ValueError(f"x: expected pixels for {window}, got {tuple(x.shape)}")
        check_shape("y", y, (x.shape[0], outputs, high, wide))
    if any(size > 1 and step == 0 for size, step in zip(y.shape, y.stride(), strict=True)):
        raise ValueError("y: expected memory of its own for every element, got a stride of 0")
    return window


def _window(a: Tensor, geometry: tuple[int, ...]) -> Window:
    """The op's six numbers as a window."""
    kernel = (a.shape[3], a.shape[4]) if a.dim() == 5 else (1, 1)
    return Window(kernel, geometry[:2], geometry[2:4], geometry[4:])  # type: ignore[arg-type]


def key(y: Tensor, x: Tensor, a: Tensor, b: Tensor, *_: object, **__: object) -> Key:
    """What the configuration depends on: neither rows nor adapters, nor the bank's size or rank."""
    return {
        "tokens": tokens_of(y, a.dim() == 3),
        "inputs": a.shape[2],
        "taps": a.shape[3:].numel(),
        "outputs": b.shape[2],
        "dtype": short(x.dtype),
    }


def plan(
    config: Config,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
) -> tuple[Tensor, list[Launch]]:
    """A copy of `y` and the launches that change it, for the tools, which run them many times."""
    pairs = (as_pair("", value, 0) for value in (stride, padding, dilation))
    window = _window(a, tuple(number for pair in pairs for number in pair))
    return plan_rows(config, y.clone(), x, a, b, slots, scales, ranks, window)


def _lora_rows_triton(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    *geometry: int,
) -> None:
    config = lookup("lora_rows", key(y, x, a, b), target_of(y.device))
    changed, launches = plan_rows(config, y, x, a, b, slots, scales, ranks, _window(a, geometry))
    run(launches)
    if changed is not y:
        y.copy_(changed)


def _lora_rows_torch(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    *geometry: int,
) -> None:
    lora_rows_torch(y, x, a, b, slots, scales, ranks, _window(a, geometry))


torch.library.define(
    "heatsink::lora_rows",
    "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor slots, Tensor scales, Tensor? ranks, "
    "int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w) -> ()",
)
torch.library.impl("heatsink::lora_rows", "default", _lora_rows_torch)
torch.library.impl("heatsink::lora_rows", "cuda", _lora_rows_triton)
torch.library.register_fake("heatsink::lora_rows", lambda *given: None)
_native.load()

OP = Op(
    name="lora_rows",
    public=lora_rows,
    kernels=(SHRINK, EXPAND, FUSED),
    cases=CASES,
    key=key,
    plan=plan,
    space=space,
    smoke=SMOKE,
    changes="y",
)
