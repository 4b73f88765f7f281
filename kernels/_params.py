"""How a launch's parameters lie in the memory that a CUDA kernel reads them from.

Each at its natural alignment, in the function's order, without the constants; Triton adds two
pointers, to scratch memory and to a profiler's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from heatsink.kernels.errors import KernelError

TRAILING = 2

_FORMATS = {"i32": "i", "i64": "q", "fp32": "f"}


def passed(signature: Mapping[str, str]) -> dict[str, str]:
    """What is passed at launch: the struct format of each parameter that is no constant, by name.

    Args:
        signature: types as `Launch.signature` gives them.

    Raises:
        KernelError: if a type is not known here.
    """
    formats: dict[str, str] = {}
    for name, kind in signature.items():
        if kind.startswith("="):
            continue
        plain = kind.removesuffix(":16")
        code = "Q" if plain.startswith("*") else _FORMATS.get(plain)
        if code is None:
            raise KernelError(f"{name}: expected a pointer, i32, i64 or fp32, got {kind}")
        formats[name] = code
    return formats


def layout(formats: Iterable[str]) -> list[tuple[int, int]]:
    """Offset and size in bytes of each parameter, and of the trailing pointers."""
    places: list[tuple[int, int]] = []
    end = 0
    for code in (*formats, *"Q" * TRAILING):
        size = struct.calcsize(code)
        start = -(-end // size) * size
        places.append((start, size))
        end = start + size
    return places


def packer(formats: Iterable[str]) -> struct.Struct:
    """Packs the parameters' values and the trailing pointers as `layout` says."""
    # Native mode keeps each type's alignment, as the CUDA ABI does.
    return struct.Struct("@" + "".join(formats) + "Q" * TRAILING)
