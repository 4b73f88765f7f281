"""A linear layer whose rows have adapters of their own, which come before its activation.

    out[r] = act(x[r] W^T + bias + sample_add + terms[r]) + residual
    terms[r] = sum over n of scales[r, n] * B[slots[r, n]] (A[slots[r, n]] x[r])

over the n whose slot is not negative (`lora_rows`); the rest is `linear`. A sample without adapters
gets the bits of `linear`. A sample's bits depend on that sample, its adapters and the weight alone.
Where nothing comes behind the product, `lora_rows` can add to its result instead; an activation
can't be undone.

Terms are rounded to the dtype, then added in fp32 to the product. On the CPU with a packed weight
(C++), samples without adapters cost what they do in `linear`; of the others, a block of tokens at a
time, terms are made in memory that a thread keeps, so nothing is allocated. Elsewhere, and without
packing, the terms of all samples, which begin with -0.0, the number that changes no other when it
is added, are the `sample_add` of a `linear` that has a sample a token. Both give the same bits on
the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import heatsink.kernels.linear
import heatsink.kernels.lora_rows  # noqa: F401 - both register their ops
from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors
from heatsink.kernels._products import check_product, result_columns, unpack

# `lora_rows`'s window of a linear layer.
_POINT = (1, 1, 0, 0, 1, 1)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    *,
    ranks: Tensor | None = None,
    residual: Tensor | None = None,
    sample_add: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """`act(x W^T + bias + sample_add + terms) + residual`.

    Args:
        x: `(R, ..., K)`, fp32 or bf16, off the CPU also fp16.
        weight: `(N, K)`; with geglu, N / 2 rows of values and then N / 2 of gates.
        bias: `(N,)`.
        a: `(S, rank, K)`: every slot's A, of x's dtype.
        b: `(S, rank, N)`: every slot's B, transposed.
        slots: int32 or int64 `(R, n)`: each row's adapters; negative is none.
        scales: fp32 `(R, n)`: what each is multiplied by; ignored where there is none.
        ranks: int32 `(S,)`: a slot's true rank; the rest of `a` and `b` is not read.
        residual: of the result's shape.
        sample_add: `(R, N)`.
        activation: "", "silu", "gelu", "gelu_tanh", "quick_gelu" or "geglu".

    Returns:
        `(R, ..., N)`, with geglu `(R, ..., N / 2)`, contiguous, of the same dtype.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, `activation` is unknown or a gradient is required.
        RuntimeError: on the CPU, if a slot is none of the bank's.
    """
    check_product(x, weight, bias, sample_add, residual, activation)
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected (R, ..., K) with weight (N, K), got {tuple(x.shape)} with "
            f"{tuple(weight.shape)}"
        )
    columns = weight.shape[0]
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], result_columns(columns, activation)))
    _check_adapters(x, columns, a, b, slots, scales, ranks)
    out: Tensor = torch.ops.heatsink.lora_linear(
        x, weight, bias, residual, sample_add, activation, a, b, slots, scales, ranks
    )
    return out


def _check_adapters(
    x: Tensor,
    columns: int,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
) -> None:
    check_tensors({"x": x, "a": a, "b": b}, FLOATS)
    check_tensors({"slots": slots}, (torch.int32, torch.int64))
    check_tensors({"scales": scales}, (torch.float32,))
    if ranks is not None:
        check_tensors({"ranks": ranks}, (torch.int32,))
    for name, other in (("slots", slots), ("scales", scales), ("ranks", ranks)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {other.device}")
    if a.dim() != 3 or a.shape[2] != x.shape[-1]:
        raise ValueError(f"a: expected (S, rank, {x.shape[-1]}), got {tuple(a.shape)}")
    check_shape("b", b, (*a.shape[:2], columns))
    if slots.dim() != 2 or slots.shape[0] != x.shape[0]:
        raise ValueError(f"slots: expected shape ({x.shape[0]}, n), got {tuple(slots.shape)}")
    check_shape("scales", scales, tuple(slots.shape))
    if ranks is not None:
        check_shape("ranks", ranks, (a.shape[0],))


def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
) -> Tensor:
    shape, columns = x.shape[:-1], weight.shape[0]
    terms = x.new_full((*shape, columns), -0.0)
    if sample_add is not None:
        terms.copy_(sample_add.reshape(shape[0], *(1,) * (len(shape) - 1), columns))
    if terms.numel() and slots.numel() and a.shape[1]:
        torch.ops.heatsink.lora_rows(terms, x, a, b, slots, scales, ranks, *_POINT)
    wide = result_columns(columns, activation)
    out: Tensor = torch.ops.heatsink.linear(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        None if residual is None else residual.reshape(-1, wide),
        terms.reshape(-1, columns),
        activation,
    )
    return out.view(*shape, wide)


def _lora_linear_fake(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    activation = rest[3]
    assert isinstance(activation, str)
    return x.new_empty((*x.shape[:-1], result_columns(weight.shape[0], activation)))


def _lora_linear_packed_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    a: Tensor,
    b: Tensor,
    slots: Tensor,
    scales: Tensor,
    ranks: Tensor | None,
    scratch: Tensor,
    out: Tensor,
) -> None:
    geglu = activation == "geglu"
    rows = unpack(weight, out.shape[-1] * (2 if geglu else 1), x.shape[-1], geglu)
    out.copy_(
        _lora_linear(x, rows, bias, residual, sample_add, activation, a, b, slots, scales, ranks)
    )


_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? sample_add, str activation, "
    "Tensor a, Tensor b, Tensor slots, Tensor scales, Tensor? ranks"
)
torch.library.define("heatsink::lora_linear", f"({_ARGUMENTS}) -> Tensor")
# For engines, as `linear_packed`: the weight packed, rows dense and evenly spaced.
torch.library.define(
    "heatsink::lora_linear_packed",
    f"({_ARGUMENTS}, Tensor(a!) scratch, Tensor(b!) out) -> ()",
)
torch.library.impl("heatsink::lora_linear", "default", _lora_linear)
torch.library.impl("heatsink::lora_linear_packed", "default", _lora_linear_packed_torch)
torch.library.register_fake("heatsink::lora_linear", _lora_linear_fake)
torch.library.register_fake("heatsink::lora_linear_packed", lambda *given: None)
_native.load()
