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
    return {name: metadata.version(name) for name in LIBRARIES}


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
