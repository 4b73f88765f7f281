"""What can go wrong with a kernel besides a wrong argument (`ValueError`, `TypeError`)."""

from __future__ import annotations


class KernelError(RuntimeError):
    """A kernel can't be had or can't run here."""


class MissingTriton(KernelError):
    """Triton is needed and not installed."""


class MissingConfig(KernelError):
    """No configuration is known for an op, a key and a device."""


class CacheMismatch(KernelError):
    """A cache of compiled kernels is damaged, of other sources, or lacks what was asked for."""
