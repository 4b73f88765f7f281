"""Compiles kernels for an architecture without a GPU: the process that does it, and what it gives.

`main` reads jobs as lines of JSON and answers each with a line; binaries go to files in the folder
that is its argument. It loads Triton and no PyTorch, and is a process of its own because a kernel
defined while `TRITON_INTERPRET` is set can't be compiled any more.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from heatsink.kernels._params import layout, passed
from heatsink.kernels.errors import KernelError, MissingTriton

# No paths of this machine in the binaries: the same sources give the same bytes everywhere.
ENVIRONMENT = {"TRITON_DISABLE_LINE_INFO": "1"}

_TRITON = "Triton, which is not installed: pip install 'heatsink[kernels]'"


@dataclass(frozen=True)
class Job:
    """One kernel to compile: a launch without its tensors, and an architecture."""

    kernel: str
    module: str
    key: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    fusion: bool
    plain: tuple[str, ...]
    arch: int


@dataclass(frozen=True)
class Binary:
    """What a job gives.

    Attributes:
        file: the cubin's name in the folder.
        sha256: of its bytes.
        symbol: the function's name in it.
        shared: bytes of shared memory that a launch asks for.
        static_shared: bytes that the function holds itself.
        warps: of a block, those added by warp specialisation among them.
        cooperative: whether all blocks must be resident together.
        scratch: bytes of global memory that each block needs, and their alignment.
        registers: of a thread.
        spill_bytes: local memory of a thread.
        triton: the version that compiled it.
    """

    file: str
    sha256: str
    symbol: str
    shared: int
    static_shared: int
    warps: int
    cooperative: bool
    scratch: tuple[int, int]
    registers: int
    spill_bytes: int
    triton: str


def binary_from(fields: Mapping[str, Any]) -> Binary:
    """A `Binary` as JSON gives its fields back."""
    return Binary(**{**fields, "scratch": tuple(fields["scratch"])})


def triton_version() -> str:
    """The version of Triton that is installed.

    Raises:
        MissingTriton: if none is.
    """
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        raise MissingTriton(f"expected {_TRITON}") from None


def jit_function(name: str, module: str) -> Any:
    """The Triton function of a kernel.

    Raises:
        MissingTriton: if Triton is not installed.
    """
    try:
        found = importlib.import_module(f"heatsink.kernels.jit.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise MissingTriton(f"{name}: expected {_TRITON}") from None
    return getattr(found, f"_{name}_kernel")


def source_of(job: Job) -> Any:
    """The `ASTSource` that Triton would make for the job's launch.

    Raises:
        KernelError: if the function can't be compiled, or its parameters are not the launch's.
    """
    function = jit_function(job.kernel, job.module)
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(function, JITFunction):
        raise KernelError(
            f"{job.kernel}: expected a compiled function, got {type(function).__name__}: unset "
            "TRITON_INTERPRET before Triton's kernels are imported"
        )
    plain = sorted(p.name for p in function.params if p.do_not_specialize)
    if plain != sorted(job.plain):
        raise KernelError(
            f"{job.kernel}: expected its plain parameters to be the function's do_not_specialize, "
            f"{plain}, got {sorted(job.plain)}"
        )
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(function.params):
        kind, value = _kind(parameter, job)
        types[parameter.name] = kind.removesuffix(":16")
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind.endswith(":16"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    unknown = {*job.signature, *job.constants} - set(types)
    if unknown:
        raise KernelError(f"{job.kernel}: the launch gives {sorted(unknown)}, not its parameters")
    return ASTSource(function, types, constants, attributes)


def _kind(parameter: Any, job: Job) -> tuple[str, Any]:
    """A parameter's type and, where it is a constant, its value."""
    name, kind = parameter.name, job.signature.get(parameter.name)
    if parameter.is_constexpr:
        if name in job.constants:
            return "constexpr", job.constants[name]
        if parameter.has_default:
            return "constexpr", parameter.default
    elif kind is not None:
        wanted = parameter.annotation_type
        if wanted and wanted != kind.removesuffix(":16"):
            raise KernelError(f"{job.kernel}: {name} is annotated {wanted}, the launch says {kind}")
        if kind.startswith("="):
            return "constexpr", {"=None": None, "=1": 1}[kind]
        return kind, None
    raise KernelError(f"{job.kernel}: expected a value of {name} in the launch, got none")


def compile_job(job: Job, folder: Path) -> Binary:
    """Compile one kernel as Triton would for the job's launch, and write its cubin.

    Raises:
        KernelError: if its parameters are not those that would be passed.
        Exception: whatever Triton raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(job)
    options = {
        "num_warps": job.warps,
        "num_stages": job.stages,
        "enable_fp_fusion": job.fusion,
        "debug": False,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
    data, metadata = compiled.asm["cubin"], compiled.metadata
    if metadata.num_ctas != 1 or metadata.launch_pdl or metadata.profile_scratch_size:
        raise KernelError(
            f"{job.kernel}: clusters, dependent launches and profilers have no launcher"
        )
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder / f"{job.kernel}-sm{job.arch}-{sha256[:16]}.cubin"
    path.write_bytes(data)
    found, wanted = parameters(path), layout(passed(job.signature).values())
    if found != wanted:
        raise KernelError(f"{job.key}: expected parameters at {wanted}, the binary has {found}")
    usage = resource_usage(path)
    return Binary(
        file=path.name,
        sha256=sha256,
        symbol=metadata.name,
        shared=metadata.shared,
        static_shared=usage["SHARED"],
        warps=metadata.num_warps,
        cooperative=bool(metadata.launch_cooperative_grid),
        scratch=(metadata.global_scratch_size, metadata.global_scratch_align),
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        triton=triton.__version__,
    )


def _cuobjdump(path: Path, *flags: str) -> str:
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, *flags, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resource_usage(path: Path) -> dict[str, int]:
    """What `cuobjdump --dump-resource-usage` says of the one function of a cubin."""
    text = _cuobjdump(path, "--dump-resource-usage")
    lines = [line for line in text.splitlines() if line.strip().startswith("REG:")]
    if len(lines) != 1:
        raise KernelError(f"{path.name}: expected one function, cuobjdump shows {len(lines)}")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", lines[0])}


def parameters(path: Path) -> list[tuple[int, int]]:
    """Offset and size in bytes of a cubin's parameters, in order, from its own description."""
    text = _cuobjdump(path, "--dump-elf")
    pattern = r"EIATTR_KPARAM_INFO.*?Ordinal : (\S+)\s+Offset\s+: (\S+)\s+Size\s+: (\S+)"
    found = [[int(x, 16) for x in match] for match in re.findall(pattern, text, re.DOTALL)]
    return [(offset, size) for _, offset, size in sorted(map(tuple, found))]


def main() -> None:
    """Answer jobs from standard input until it ends."""
    folder = Path(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    # What Triton prints when it fails goes where errors go, not between the answers.
    os.dup2(2, 1)
    for line in sys.stdin:
        job = Job(**json.loads(line))
        try:
            answer: dict[str, Any] = {"binary": asdict(compile_job(job, folder))}
        # Triton raises whatever its stages raise; all of it is told to who sent the job.
        except Exception as error:  # noqa: BLE001
            answer = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
