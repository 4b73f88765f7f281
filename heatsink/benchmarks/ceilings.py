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

from heatsink.benchmarks.check import refusals
from heatsink.benchmarks.family import Cost, LeftOut
from heatsink.kernels import exp_rate
from heatsink.kernels.timing import Spread, Timed, interleaved
from heatsink.kernels.tuning_gate import check_device, one_line

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
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
        parts = [cost.bytes / self.copy]
        if cost.flops and cost.dtype in self.products:
            parts.append(cost.flops / self.products[cost.dtype])
        if cost.exponentials and self.exponentials:
            parts.append(cost.exponentials / self.exponentials)
        return max(parts)


def measure(
    device: torch.device, dtypes: Sequence[str] = ("fp16", "bf16", "fp32", "fp8")
) -> Ceilings:
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
    if dtype == "fp8":
        call = _fp8_product(side, device)
    else:
        generator = torch.Generator(device).manual_seed(1)
        # Values matter: a device that draws less power on zeros runs faster on them.
        a, b = (
            torch.randn(side, side, generator=generator, device=device).to(_DTYPES[dtype])
            for _ in range(2)
        )

        def call() -> Any:
            return torch.mm(a, b)

    return 2 * side**3 / _fastest(call, device)


def _fp8_product(side: int, device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":
        raise NotImplementedError("fp8 products are measured only on CUDA")
    generator = torch.Generator(device).manual_seed(1)
    a, b = (
        torch.randn(side, side, generator=generator, device=device).to(torch.float8_e4m3fn)
        for _ in range(2)
    )
    one = torch.ones((), device=device)
    # PyTorch has no public product of fp8 matrices.
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def _exponentials(device: torch.device) -> float:
    from heatsink.kernels._launch import run

    launches, count = exp_rate.plan(device)
    return count / _fastest(lambda: run(launches), device)
