"""Fused operators of diffusion models, one op a file. Knows nobody else in the package."""

from heatsink.kernels._cache import use_cache

__all__ = ["use_cache"]
