"""What the device does at best, measured in the same run as what is set beside it.

Matrix products: the best rate among large square ones of a dtype. Copy: a large tensor, bytes read
and written. Exponentials: a kernel whose values stay in registers (CUDA only). They are rates that
this machine reached, not a data sheet's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatsink.benchmarks.check import refusals
from heatsink.benchmarks.family import Cost, LeftOut
from heatsink.kernels import exp_rate
from heatsink.kernels.timing import Spread, Timed, interleaved
from heatsink.kernels.tuning_gate import check_device, one_line

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ALL = (*_DTYPES, "fp8", "int8")
_ROUNDS = 15


@dataclass(frozen=True)
class Ceilings:
    """Rates reached.

    Attributes:
        copy: bytes a second, read and written.
        products: floating-point operations a second, by dtype.
        exponentials: a second; 0 where not measured.
        left_out: what could not be measured, and why.
    """

    copy: float
    products: dict[str, float]
    exponentials: float
    left_out: tuple[LeftOut, ...] = ()

    def least_seconds(self, cost: Cost) -> float:
        """How long the slowest part of the work takes at these rates; 0 if none is known."""
        # Products of all dtypes share the tensor cores; what was not measured bounds nothing.
        rates = self.products
        products = sum(n / rates[dtype] for dtype, n in cost.flops.items() if dtype in rates)
        parts = [cost.bytes / self.copy, products]
        if cost.exponentials and self.exponentials:
            parts.append(cost.exponentials / self.exponentials)
        return max(parts)


def measure(device: torch.device, dtypes: Sequence[str] = ALL) -> Ceilings:
    """Measure every ceiling on a device; on the CPU with small problems and no exponentials."""
    cuda = device.type == "cuda"
    left_out: list[LeftOut] = []
    products: dict[str, float] = {}
    for dtype in dtypes:
        side = (8192 if dtype != "fp32" else 4096) if cuda else 1024
        rate = _attempt(dtype, left_out, device, lambda: _product(dtype, side, device))  # noqa: B023
        if rate:
            products[dtype] = rate
    exponentials = 0.0
    if cuda:
        exponentials = _attempt("exp", left_out, device, lambda: _exponentials(device))
    else:
        left_out.append(LeftOut("exp", "only on CUDA"))
    return Ceilings(
        _copy(device, 2**30 if cuda else 2**26), products, exponentials, tuple(left_out)
    )


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    return _copy(device, 2**30)


def _attempt(
    name: str, left_out: list[LeftOut], device: torch.device, rate: Callable[[], float]
) -> float:
    try:
        return rate()
    except refusals() as error:
        left_out.append(LeftOut(name, one_line(error)))
        check_device(device, f"the ceiling of {name}")
        return 0.0


def _fastest(call: Callable[[], Any], device: torch.device) -> float:
    return Spread.of(interleaved([Timed(call)], _ROUNDS, device)[0]).fastest


def _copy(device: torch.device, size: int) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _product(dtype: str, side: int, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(1)
    # Values matter: a device that draws less power on zeros runs faster on them.
    a, b = (torch.randn(side, side, generator=generator, device=device) for _ in range(2))
    makers = {"fp8": _fp8_product, "int8": _int8_product}
    call = makers[dtype](a, b) if dtype in makers else _plain_product(a, b, _DTYPES[dtype])
    return 2 * side**3 / _fastest(call, device)


def _plain_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b = a.to(dtype), b.to(dtype)
    return lambda: torch.mm(a, b)


# PyTorch has public names for neither of these products.
def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _int8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    a, b = ((32 * x).clamp(-127, 127).to(torch.int8) for x in (a, b))
    b = b.t()
    return lambda: torch._int_mm(a, b)


def _exponentials(device: torch.device) -> float:
    from heatsink.kernels._launch import run

    launches, count = exp_rate.plan(device)
    return count / _fastest(lambda: run(launches), device)
