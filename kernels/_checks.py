"""Checks of arguments that many ops share; all raise before anything is launched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def short(dtype: torch.dtype) -> str:
    """`torch.float16` -> `fp16`, as configurations and Triton say it."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def check_tensors(tensors: Mapping[str, Tensor | None], dtypes: tuple[torch.dtype, ...]) -> None:
    """Check that all given tensors are tensors without gradient, of one device and one dtype.

    Args:
        tensors: by argument name; the first sets device and dtype and may not be None.
        dtypes: what the dtype may be.

    Raises:
        TypeError: if one is no tensor, or has another dtype.
        ValueError: if one requires grad, or lies on another device.
    """
    first = None
    for x in tensors.values():
        if x is None and first is not None:
            continue
        # Every call comes through here, so a fault is only seen; what it is, is found below.
        if not isinstance(x, Tensor) or (x.requires_grad and torch.is_grad_enabled()):
            break
        if first is None:
            first, dtype, device = x, x.dtype, x.device
            if dtype not in dtypes:
                break
        elif x.dtype != dtype or x.device != device:
            break
    else:
        return
    _raise_fault(tensors, dtypes)


def _raise_fault(tensors: Mapping[str, Tensor | None], dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise for the first fault that `check_tensors` finds, in the order of its description."""
    first_name = next(iter(tensors))
    first = tensors[first_name]
    for name, x in tensors.items():
        if x is None and name != first_name:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient (inference only), got requires_grad")
        assert isinstance(first, Tensor)
        if x.dtype not in dtypes or x.dtype != first.dtype:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            wanted = f"one of {names}" if x is first else f"{first.dtype} like {first_name}"
            raise TypeError(f"{name}: expected {wanted}, got {x.dtype}")
        if x.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} like {first_name}, got {x.device}"
            )


def check_eps(eps: float) -> None:
    """Raise unless `eps` is a positive number that fp32 holds."""
    if not isinstance(eps, int | float) or isinstance(eps, bool):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 < eps < 2**128:
        raise ValueError(f"eps: expected a positive number below 2^128, got {eps}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `x` has exactly `shape`."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
