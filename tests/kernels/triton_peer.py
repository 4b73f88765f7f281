"""Compiles with Triton's own JIT and with ours, for tests to compare: prints one JSON object.

A program of its own, since the tests' process runs kernels under the interpreter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from heatsink.kernels import _compile, aot
from heatsink.kernels._launch import Kernel, Launch
from heatsink.kernels._params import layout, passed
from heatsink.kernels.errors import KernelError
from heatsink.kernels.silu_mul import OP


# Not Python to a type checker: Triton compiles it.
@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _mixed_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    scale,
    out_ptr,
    rows,
    wide,
    step,
    bias_ptr,
    few,
    BLOCK: tl.constexpr,
    TWICE: tl.constexpr = True,
):
    """Every kind of parameter, in an order that needs padding."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < rows
    x = tl.load(x_ptr + offs * step, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs, mask=mask, other=0.0)
    # A product and a sum, which may be contracted.
    out = x * scale + few
    if TWICE:
        out *= 2
    tl.store(out_ptr + offs + wide, out.to(out_ptr.dtype.element_ty), mask=mask)


# Not Python to a type checker: Triton compiles it.
@triton.jit  # type: ignore[untyped-decorator]
def _loop_kernel(x_ptr, out_ptr, rounds, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """A loop of products, which is pipelined as deep as the stages say."""
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.zeros((N, N), dtype=tl.float32)
    for i in range(rounds):
        x = tl.load(x_ptr + i * N * N + offs)
        acc = tl.dot(x, x, acc)
    tl.store(out_ptr + offs, acc)


LOOP = Kernel("loop", module="loop")
MIXED = Kernel("mixed", module="mixed", plain=("rows",))


class NoDevice:
    """What Triton asks a driver while it compiles, for a device that is not there."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return GPUTarget("cuda", self._arch, 32)


def mixed(**changes: Any) -> Launch:
    """A launch of the kernel above."""
    x = torch.empty(4096, dtype=torch.float16, device="meta")
    args: dict[str, Any] = {
        "x_ptr": x,
        "scale": 0.5,
        "out_ptr": x[1:],
        "rows": 4000,
        "wide": 2**40 + 1,
        "step": 1,
        "bias_ptr": None,
        "few": 48,
    }
    for name in set(args) & set(changes):
        args[name] = changes.pop(name)
    fields: dict[str, Any] = {"constants": {"BLOCK": 256}, **changes}
    return Launch(MIXED, grid=(16, 1, 1), args=args, **fields)


def loop(stages: int) -> Launch:
    """A launch of the loop."""
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")
    args: dict[str, Any] = {"x_ptr": x, "out_ptr": x.float(), "rounds": 17}
    return Launch(LOOP, (1, 1, 1), args, {"N": 64}, stages=stages)


class Pointer:
    """What the JIT sees of a tensor."""

    def __init__(self, x: torch.Tensor) -> None:
        self.dtype = x.dtype
        self._address = int(x.storage_offset()) * x.element_size()

    def data_ptr(self) -> int:
        """An address of the same alignment."""
        return self._address


def by_triton(launch: Launch, arch: int) -> bytes:
    """The cubin of Triton's own JIT, called as `run` calls it."""
    driver.set_active(NoDevice(arch))
    function = launch.kernel.function()
    function.device_caches.clear()
    args = {n: Pointer(x) if isinstance(x, torch.Tensor) else x for n, x in launch.args.items()}
    compiled = function.run(
        **args,
        **launch.constants,
        grid=launch.grid,
        warmup=True,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=launch.kernel.fusion,
    )
    return bytes(compiled.asm["cubin"])


def compare(launch: Launch, arch: int, folder: Path) -> dict[str, Any]:
    """Both binaries' digests, and the parameters as planned and as the binary has them."""
    binary = _compile.compile_job(aot.job_of(launch, arch), folder)
    return {
        "ours": binary.sha256,
        "triton": hashlib.sha256(by_triton(launch, arch)).hexdigest(),
        "planned": layout(passed(launch.signature()).values()),
        "found": _compile.parameters(folder / binary.file),
    }


def refusal(job: _compile.Job) -> str:
    """Why a job is refused."""
    try:
        _compile.source_of(job)
    except KernelError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    """Launches that are not what the function takes."""
    job = aot.job_of(mixed(), 90)
    signature: Mapping[str, str] = job.signature
    changed = {
        "plain": dataclasses.replace(job, plain=()),
        "unknown": dataclasses.replace(job, constants={**job.constants, "WIDTH": 1}),
        "absent": dataclasses.replace(
            job, signature={n: kind for n, kind in signature.items() if n != "few"}
        ),
        "constant": dataclasses.replace(job, constants={}),
    }
    return {name: refusal(changed_job) for name, changed_job in changed.items()}


def main() -> None:
    """Compare, and print what came of it."""
    folder = Path(sys.argv[1])
    # Found by name, as the functions of the package are.
    for name in ("loop", "mixed"):
        sys.modules[f"heatsink.kernels.jit.{name}"] = sys.modules[__name__]
    bias = torch.empty(4096, dtype=torch.float32, device="meta")
    launches = {
        "mixed": mixed(),
        "bias": mixed(bias_ptr=bias, step=2, few=7, wide=0),
        "constant": mixed(constants={"BLOCK": 128, "TWICE": False}, warps=8, stages=3),
        "exact": dataclasses.replace(mixed(), kernel=dataclasses.replace(MIXED, fusion=False)),
        "loop": loop(stages=2),
        "pipelined": loop(stages=4),
        "silu_mul": aot.launches_of(OP, OP.cases[1], 90)[0],
    }
    found = {
        f"{name} sm_{arch}": compare(launch, arch, folder)
        for name, launch in launches.items()
        for arch in ((80, 90, 120) if name == "mixed" else (90,))
    }
    print(json.dumps({"compared": found, "refused": refusals()}))


if __name__ == "__main__":
    main()
