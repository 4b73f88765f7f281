"""How a launch's parameters lie in the memory that a CUDA kernel reads them from.

Each at its natural alignment, in the function's order, without the constants; Triton adds two
pointers, to scratch memory and to a profiler's.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Mapping
from typing import Any

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


class Parameters:
    """Memory that a launch's parameters are packed into, as a driver's launch function takes it.

    Attributes:
        names: of the parameters that are passed, in order.
        address: of an array of pointers, one to each value; valid as long as this object.
    """

    def __init__(self, signature: Mapping[str, str]) -> None:
        """Lay out the parameters of all launches with this signature."""
        formats = passed(signature)
        self.names = tuple(formats)
        # Native mode keeps each type's alignment, as the CUDA ABI does.
        self._struct = struct.Struct("@" + "".join(formats.values()) + "Q" * TRAILING)
        self._buffer = ctypes.create_string_buffer(self._struct.size)
        start = ctypes.addressof(self._buffer)
        places = [start + offset for offset, _ in layout(formats.values())]
        self._pointers = (ctypes.c_void_p * len(places))(*places)
        self.address = ctypes.addressof(self._pointers)

    def pack(self, args: Mapping[str, Any], scratch: int = 0) -> None:
        """Set the values: tensors by their addresses, scratch memory, no profiler."""
        given = (args[name] for name in self.names)
        values = (x if isinstance(x, int | float) else x.data_ptr() for x in given)
        self._struct.pack_into(self._buffer, 0, *values, scratch, 0)
