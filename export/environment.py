"""What a build depends on besides the model: versions of libraries, and the processor."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from heatsink.runtime.errors import NotBuilt

CPU = "cpu"
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")


def check_device(device: str) -> None:
    """Refuse a device that engines are not built for.

    Raises:
        NotBuilt: it is not the CPU. Parity and known answers hold for the device on which they were
            measured, and no build measures on another.
    """
    if device != CPU:
        raise NotBuilt(
            f"device {device!r}: engines for it are not built yet; this version builds and opens "
            f"them on {CPU!r}"
        )


def version() -> str:
    """This package's version."""
    return metadata.version("heatsink")


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide an engine's bytes and results."""
    return {name: _version_of(name) for name in LIBRARIES}


def _version_of(name: str) -> str:
    # ONNX Runtime's builds for GPUs are packages of another name with the same module.
    for package in (name, f"{name}-gpu"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return "absent"


def identity() -> dict[str, str]:
    """What of this machine may change a result's bits, besides libraries and processor."""
    import torch

    from heatsink.kernels import _native

    instructions = torch.backends.cpu.get_cpu_capability()
    if _native.available():
        instructions = f"{instructions}, products in {_native.instruction_set()}"
    return {
        "instruction_set": instructions,
        "threads": str(torch.get_num_threads()),
        "ops": "C++" if _native.available() else "PyTorch",
    }


def differences(
    device: str, libraries_then: Mapping[str, str], identity_then: Mapping[str, str]
) -> list[str]:
    """What is another here than where an engine was built, each as `name: then, now`."""
    then = {"processor": device, **identity_then, **libraries_then}
    now = {"processor": processor(), **identity(), **libraries()}
    return [f"{n}: {then[n]}, here {now[n]}" for n in then if n in now and then[n] != now[n]]


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
