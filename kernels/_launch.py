"""A launch of a Triton kernel as data: what runs it, compiles it ahead of time and tunes it agree.

An op's `plan` makes its launches from tensors, which may lie on the meta device; `run` executes
them: from an opened cache of compiled kernels, or through Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels import _cache
from heatsink.kernels._compile import jit_function

ARCHS = (80, 89, 90, 100, 120)
ALIGNMENT = 16

Value = Tensor | int | float | None

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel: where it is, and what it may be compiled for.

    Attributes:
        name: the function's name without `_` and `_kernel`; unique in the package.
        module: its module's name under `heatsink.kernels.jit`.
        archs: the architectures it is written for: 90 is sm_90.
        plain: integer parameters that are never specialised, so that one binary serves every
            value; the function's `do_not_specialize` names the same.
        fusion: whether products and sums may be contracted; False where bits are specified.
        scratch: whether some of its binaries need global memory of their own at a launch, as those
            that make TMA descriptors do.
    """

    name: str
    module: str
    archs: tuple[int, ...] = ARCHS
    plain: tuple[str, ...] = ()
    fusion: bool = True
    scratch: bool = False

    def function(self) -> Any:
        """The `triton.jit` function.

        Raises:
            MissingTriton: if Triton is not installed.
        """
        return jit_function(self.name, self.module)


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: what is launched.
        grid: programs along x, y, z; nothing is launched where one is 0.
        args: the parameters by name in the function's order; None is a constant.
        constants: the `tl.constexpr` parameters.
        warps: warps of a program.
        stages: depth of the software pipeline.
        kept: what must not be freed before it runs: tensors whose addresses its arguments hold.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    args: Mapping[str, Value]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 2
    kept: Any = field(default=None, compare=False, repr=False)

    def signature(self) -> dict[str, str]:
        """Each parameter's type as Triton specialises it: `*fp16:16`, `i32:16`, `i32`, `=1`.

        `:16` marks what is known to be divisible by 16 (an address, in bytes); `=` a constant.
        """
        return {name: _type_of(name, value, self.kernel) for name, value in self.args.items()}

    def key(self) -> str:
        """What distinguishes the binary of this launch from the kernel's others."""
        types = ",".join(f"{name}:{kind}" for name, kind in self.signature().items())
        constants = ",".join(f"{name}={value}" for name, value in sorted(self.constants.items()))
        return f"{self.kernel.name}({types})[{constants}]w{self.warps}s{self.stages}"


def address(x: Tensor) -> int:
    """Where a tensor begins; one without memory stands for one where the allocator puts it."""
    if x.device.type == "meta":
        return int(x.storage_offset()) * x.element_size()
    return x.data_ptr()


def _type_of(name: str, value: Value, kernel: Kernel) -> str:
    if value is None:
        return "=None"
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype] + (":16" if address(value) % ALIGNMENT == 0 else "")
    if isinstance(value, float):
        return "fp32"
    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
    if name in kernel.plain:
        return kind
    if value == 1:
        return "=1"
    return kind + (":16" if value % ALIGNMENT == 0 else "")


def run(launches: Iterable[Launch]) -> None:
    """Execute launches in order, queued on the current stream of their tensors' device.

    Raises:
        MissingTriton: if a kernel must be compiled and Triton is not installed.
        CacheMismatch: if a cache of compiled kernels is in use and lacks one.
    """
    cache = _cache.in_use()
    for launch in launches:
        if 0 in launch.grid or (cache and cache.run(launch)):
            continue
        with _on_device_of(launch):
            _run_jit(launch)


def _on_device_of(launch: Launch) -> AbstractContextManager[Any]:
    """Make the device of a launch's tensors the current one, which is where Triton launches."""
    tensor = next(value for value in launch.args.values() if isinstance(value, Tensor))
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.get_device())
    return nullcontext()


def _run_jit(launch: Launch) -> None:
    if launch.kernel.scratch:
        _allow_scratch()
    launch.kernel.function()[launch.grid](
        **launch.args,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=launch.kernel.fusion,
    )


def _allow_scratch() -> None:
    """Let Triton allocate what a kernel asks for; it keeps an allocator for each thread alone."""
    triton = importlib.import_module("triton")
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.uint8, device="cuda")
    )
