"""What a measurement was made on: the machine, its driver, the versions, what is importable."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from importlib import metadata
from typing import Any

# module -> distribution. What the tools use where it is there; absence is reported, not an error.
LIBRARIES = {
    "numpy": "numpy",
    "triton": "triton",
    "pytest": "pytest",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "diffusers": "diffusers",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "peft": "peft",
    "xformers": "xformers",
    "flash_attn_interface": "flash_attn_3",
    "sageattention": "sageattention",
    "cuda.bindings": "cuda-bindings",
}


def environment() -> dict[str, Any]:
    """The whole report, as JSON values."""
    import torch

    found, left_out = importable()
    return {
        "device": device_name(),
        "driver": driver(),
        "versions": versions(),
        "importable": found,
        "left_out": left_out,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "processors": len(os.sched_getaffinity(0)),
        "compiler": compiler(),
        # Of the last minute, before anything is measured: what else the machine does.
        "load": round(os.getloadavg()[0], 2),
        **_cuda(),
    }


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def device_name() -> str:
    """The current CUDA device's name, or `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name(torch.cuda.current_device())


def folder_name(device: str) -> str:
    """A device's name as folders and configuration files have it: `nvidia_h200`."""
    from heatsink.kernels._config import file_name

    return file_name(device)


def driver() -> str:
    """The NVIDIA driver's version, or `absent`."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "absent"
    return done.stdout.split("\n")[0].strip() or "absent"


def compiler() -> str:
    """The C compiler that Triton builds its launchers with, by name, or `absent`."""
    wanted = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    found = next((name for name in wanted if name and shutil.which(name)), "absent")
    return os.path.basename(found)


def versions() -> dict[str, str]:
    """Of Python, PyTorch, what PyTorch was built with, Triton and this package."""
    import torch

    import heatsink

    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {
        "heatsink": heatsink.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "absent",
        "cudnn": "absent" if cudnn is None else str(cudnn),
        "triton": _version_of("triton", "triton"),
    }


def importable() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the libraries that can be imported, and why each of the others can't."""
    found: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for module, distribution in LIBRARIES.items():
        reason = why_not(module)
        if reason:
            left_out[module] = reason
        else:
            found[module] = _version_of(module, distribution)
    return found, left_out


def why_not(module: str) -> str:
    """Why a module can't be imported, in a line; empty where it can."""
    try:
        importlib.import_module(module)
    # A library built for another CUDA or PyTorch fails with any of these while it loads.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _version_of(module: str, distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ImportError:
        return "absent"


def processor() -> str:
    """The processor's name."""
    from heatsink.export.environment import processor as name

    return name()
