"""A linear layer and what follows it, in one op: `act(x W^T + bias + sample_add) + residual`.

Layouts: `x (..., K)`, `weight (N, K)` as PyTorch's; `sample_add (batch, N)` is added to every row
of a sample. `kernels/_products.py` has the activations. fp32, bf16, and off the CPU fp16; sums and
epilogue are fp32 and the result is rounded once.

CPU: C++ (AMX for bf16, AVX-512, AVX2 or plain), which packs the weight at every call; the `packed`
variants take it packed and allocate nothing. A row's bits depend on that row and the weight alone:
not on other rows, places, strides or threads, nor on the instruction set. In fp32, 512 products at
a time are summed in order of k by fused multiply-adds from 0, and these sums in order. In bf16, 32
products at a time: those of even and of odd k apart, by fused multiply-adds from 0, and the sum of
both is added to what came before, denormal numbers flushed to 0, as AMX does.
Elsewhere, and without the extension: PyTorch's product, then the epilogue in PyTorch; on CUDA the
product is rounded before the epilogue, and what bits depend on is the library's affair.

Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", TDPBF16PS
(https://www.intel.com/sdm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels._checks import FLOATS, check_shape, check_tensors
from heatsink.kernels._products import (
    as_rows,
    check_product,
    finish,
    pack,
    packed_size,
    result_columns,
    unpack,
    wide,
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    sample_add: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """`act(x W^T + bias + sample_add) + residual`, in fp32 with one rounding.

    Args:
        x: `(..., K)`, fp32 or bf16, off the CPU also fp16; `(batch, ..., K)` with `sample_add`.
        weight: `(N, K)`; with geglu, N / 2 rows of values and then N / 2 of gates.
        bias: `(N,)`.
        residual: of the result's shape.
        sample_add: `(batch, N)`.
        activation: "", "silu", "gelu", "gelu_tanh", "quick_gelu" or "geglu".

    Returns:
        `(..., N)`, with geglu `(..., N / 2)`, contiguous, of the same dtype.

    Raises:
        TypeError: if an argument is of the wrong type or dtype.
        ValueError: if shapes or devices differ, `activation` is unknown or a gradient is required.
    """
    check_product(x, weight, bias, sample_add, residual, activation)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        expected = f"(N, {x.shape[-1]})" if x.dim() else "x (..., K)"
        raise ValueError(f"weight: expected {expected}, got {tuple(weight.shape)}")
    if residual is not None:
        columns = result_columns(weight.shape[0], activation)
        check_shape("residual", residual, (*x.shape[:-1], columns))
    out: Tensor = torch.ops.heatsink.linear(x, weight, bias, residual, sample_add, activation)
    return out


def pack_linear(weight: Tensor, dtype: torch.dtype | None = None, *, geglu: bool = False) -> Tensor:
    """A weight packed for `linear_packed` or `conv2d_packed`.

    Args:
        weight: `(N, K)`, or a convolution's `(N, C, height, width)`.
        dtype: float32 or bfloat16, which the weight is rounded to; its own if None.
        geglu: whether it is packed for that activation, and no other.

    Returns:
        A dense tensor of one dimension, the same for every processor. It can be stored.

    Raises:
        TypeError: if `weight` is no tensor, or the dtype is another.
        ValueError: if `weight` has another shape, or a gradient is required.
    """
    check_tensors({"weight": weight}, FLOATS)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"dtype: expected float32 or bfloat16, got {dtype}")
    if weight.dim() not in (2, 4) or weight.numel() == 0 or (geglu and weight.shape[0] % 2):
        even = ", N even for geglu" if geglu else ""
        raise ValueError(
            f"weight: expected (N, K) or (N, C, height, width){even}, got {tuple(weight.shape)}"
        )
    out: Tensor = torch.ops.heatsink.pack_linear(weight.to(dtype), geglu)
    return out


def _linear_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
) -> Tensor:
    dtype = wide(x)
    bias = None if bias is None else bias.to(dtype)
    y = F.linear(x.to(dtype), weight.to(dtype), bias)
    return finish(y, -1, sample_add, activation, residual, x.dtype).contiguous()


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], result_columns(weight.shape[0], activation)))


def _pack_linear_torch(weight: Tensor, geglu: bool) -> Tensor:
    return pack(as_rows(weight), geglu, weight.dtype == torch.bfloat16)


def _pack_linear_fake(weight: Tensor, geglu: bool) -> Tensor:
    columns = weight.shape[0]
    depth = weight.shape[1:].numel()
    return weight.new_empty(packed_size(columns, depth, weight.dtype, geglu))


def _linear_packed_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    scratch: Tensor,
    out: Tensor,
) -> None:
    geglu = activation == "geglu"
    rows = unpack(weight, out.shape[-1] * (2 if geglu else 1), x.shape[-1], geglu)
    out.copy_(_linear_torch(x, rows, bias, residual, sample_add, activation))


def _linear_packed_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sample_add: Tensor | None,
    activation: str,
    scratch: Tensor,
    out: Tensor,
) -> None:
    return None


_EPILOGUE = "Tensor? bias, Tensor? residual, Tensor? sample_add, str activation"
torch.library.define("heatsink::linear", f"(Tensor x, Tensor weight, {_EPILOGUE}) -> Tensor")
torch.library.define("heatsink::pack_linear", "(Tensor weight, bool geglu) -> Tensor")
# For engines: `weight` packed, `scratch` of `scratch_bytes()` (of no
# elements: each thread keeps memory of its own), rows of x, residual and out dense
# and evenly spaced. Allocates nothing.
torch.library.define(
    "heatsink::linear_packed",
    f"(Tensor x, Tensor weight, {_EPILOGUE}, Tensor(a!) scratch, Tensor(b!) out) -> ()",
)
torch.library.impl("heatsink::linear", "default", _linear_torch)
torch.library.impl("heatsink::pack_linear", "default", _pack_linear_torch)
torch.library.impl("heatsink::linear_packed", "default", _linear_packed_torch)
torch.library.register_fake("heatsink::linear", _linear_fake)
torch.library.register_fake("heatsink::pack_linear", _pack_linear_fake)
torch.library.register_fake("heatsink::linear_packed", _linear_packed_fake)
_native.load()
