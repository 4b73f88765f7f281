"""Joules that a device used between two readings: NVML on a GPU, RAPL on a CPU.

Counters advance a few dozen times a second, and count everything that the device does, its idle
power too: what is metered should last for half a second and more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatsink.runtime.errors import NotBuilt

POWERCAP = Path("/sys/class/powercap")
_LIBRARY = "libnvidia-ml.so.1"


class Rapl:
    """The processors' packages, as the kernel's powercap interface counts them.

    Args:
        root: where its zones are.

    Raises:
        NotBuilt: there are none, or they may not be read; says which.
    """

    name = "RAPL, all packages"

    def __init__(self, root: Path = POWERCAP) -> None:
        # Packages alone: zones below them (`intel-rapl:0:1`) are parts of the same.
        self._zones = [path for path in sorted(root.glob("intel-rapl:*")) if _is_package(path)]
        if not self._zones:
            raise NotBuilt(f"not available here: no package of intel-rapl under {root}")
        try:
            self._ranges = [_number(zone / "max_energy_range_uj") for zone in self._zones]
            self._read()
        except (OSError, ValueError) as error:
            raise NotBuilt(f"not available here: {error}") from error

    def start(self) -> list[int]:
        """A reading to give `joules`."""
        return self._read()

    def joules(self, start: Sequence[int]) -> float:
        """Since a reading; each counter may have gone round once."""
        pairs = zip(start, self._read(), self._ranges, strict=True)
        return sum((end - begin) % (most + 1) for begin, end, most in pairs) / 1e6

    def _read(self) -> list[int]:
        return [_number(zone / "energy_uj") for zone in self._zones]


def _is_package(zone: Path) -> bool:
    try:
        name = (zone / "name").read_text(encoding="ascii")
    except (OSError, ValueError):
        return False
    return zone.name.count(":") == 1 and name.startswith("package")


def _number(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


class Nvml:
    """The current CUDA device, as NVIDIA's management library counts it (Volta and later).

    Raises:
        NotBuilt: the library, or the device's counter, is not there.
    """

    name = "NVML"

    def __init__(self) -> None:
        import torch

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        try:
            self._library: Any = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise NotBuilt(f"not available here: {error}") from error
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        # By UUID: NVML counts all devices, whatever CUDA_VISIBLE_DEVICES says.
        name = ctypes.c_char_p(f"GPU-{uuid.removeprefix('GPU-')}".encode())
        self._call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._handle))
        self.start()

    def start(self) -> int:
        """A reading to give `joules`."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value

    def joules(self, start: int) -> float:
        """Since a reading."""
        return (self.start() - start) / 1e3

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise NotBuilt(f"not available here: {name} gave the error {code}")


Meter = Rapl | Nvml


@dataclass(frozen=True)
class NoMeter:
    """No meter; its name is the reason."""

    name: str


def meter(device: str, root: Path = POWERCAP) -> Meter | NoMeter:
    """The device's meter, or why there is none.

    Args:
        device: `cpu` or `cuda`.
        root: see `Rapl`.
    """
    try:
        return Nvml() if device == "cuda" else Rapl(root)
    except NotBuilt as error:
        return NoMeter(str(error))
