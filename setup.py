"""Builds the optional C++ extension `heatsink._C`; everything else is in pyproject.toml.

The package works without it: every op has a PyTorch implementation. So when the compiler, PyTorch's
headers or Python's are missing, or `HEATSINK_NO_EXT=1` is set, a notice is printed and the install
goes on. Nothing here looks at the machine's hardware; the code is portable and picks its
instruction set when it is loaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MINIMUM_TORCH = (2, 11)
# Sorted, so that the same sources give the same binary.
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
# The stable ABI of PyTorch 2.11 and the limited API of Python 3.11: one binary for all later ones.
MACROS = [("TORCH_TARGET_VERSION", "0x020B000000000000ULL"), ("Py_LIMITED_API", "0x030B0000")]
# Contraction would change bits. Neither -fno-math-errno nor -fno-trapping-math does; they let
# loops with a square root or a selection be vectorised.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]


def notice(reason: str) -> None:
    """Say on stderr why there will be no extension."""
    print(
        f"heatsink: building without the C++ extension: {reason}. "
        "The PyTorch implementations are used instead: slower, with the same bits except in "
        "attention, linear, conv2d, lora_merge and lora_rows.",
        file=sys.stderr,
    )


def torch_root() -> Path | None:
    """The folder of an installed PyTorch that is new enough, or None with a notice."""
    # Found without importing it: an import takes seconds and may fail for want of a driver.
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        notice("PyTorch is not importable where the build runs (use pip --no-build-isolation)")
        return None
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        notice(f"PyTorch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}")
        return None
    return Path(spec.submodule_search_locations[0])


def extensions() -> list[Extension]:
    """The extension to build, or nothing with a notice that says why."""
    if os.environ.get("HEATSINK_NO_EXT") == "1":
        notice("HEATSINK_NO_EXT=1 is set")
        return []
    root = torch_root()
    if root is None:
        return []
    return [
        Extension(
            "heatsink._C",
            sources=SOURCES,
            depends=HEADERS,
            library_dirs=[str(root / "lib")],
            libraries=["torch_cpu", "torch"],
            define_macros=MACROS,
            # As system headers, so that warnings speak of this package alone.
            extra_compile_args=[*FLAGS, "-isystem", str(root / "include")],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


class OptionalBuild(build_ext):
    """Builds the extension; a failure is a notice, not an error."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`, or print why it is left out."""
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            notice(f"the compiler failed ({error})")


built = extensions()
setup(
    ext_modules=built,
    cmdclass={"build_ext": OptionalBuild},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if built else {},
)
