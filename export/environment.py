"""What a build depends on besides the model: versions of libraries, and the processor."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "diffusers", "transformers")


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


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
