"""What can go wrong with a kernel besides a wrong argument (`ValueError`, `TypeError`).

`exit_code` is what the command line returns: 2 where the caller can mend it, 1 for the rest.
"""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel can't be had or can't run here."""

    exit_code = 1


class MissingTriton(KernelError):
    """Triton is needed and not installed."""

    exit_code = 2


class MissingDevice(KernelError):
    """A CUDA device is needed and there is none."""

    exit_code = 2


class MissingConfig(KernelError):
    """No configuration is known for an op, a key and a device."""


class CacheMismatch(KernelError):
    """A cache of compiled kernels is damaged, of other sources, or lacks what was asked for."""

    exit_code = 2


class DeviceLost(KernelError):
    """The device answers nothing any more after a kernel failed on it."""
