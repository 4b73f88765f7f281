"""Whether a configuration may be used: its result against the default's, and its failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._config import Key
from heatsink.kernels._op import Op
from heatsink.kernels.errors import DeviceLost, KernelError

# Sums taken in another order and one rounding: a few units in the last place of the largest value.
_ULPS = 8
# Quantised by block, so the blocks' size moves the error itself. Relative, in the 2-norm: twice the
# error that the op's documentation promises, by the key's `pure`.
_QUANTISED = {"attention_fp8": {0: 0.04, 1: 0.14}}


class WrongResult(KernelError):
    """A configuration's result is not the default's."""


def tensors(outputs: Any) -> list[Tensor]:
    """An op's outputs as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def check(op: Op, key: Key, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare outputs with the default configuration's.

    Bit by bit where they are integers or where no kernel may contract (their bits are specified);
    else within a few units in the last place of the largest value.

    Raises:
        WrongResult: if they differ by more.
    """
    specified = all(not kernel.fusion for kernel in op.kernels)
    for out, wanted in zip(outputs, expected, strict=True):
        if specified or not wanted.is_floating_point():
            same = torch.equal(out, wanted)
            if not same:
                raise WrongResult("other bits than the default configuration's")
            continue
        error = (out.double() - wanted.double()).abs()
        scale = float(wanted.double().abs().amax()) if wanted.numel() else 0.0
        if op.name in _QUANTISED:
            share = _QUANTISED[op.name][int(key.get("pure", 0))]
            allowed = share * float(wanted.double().norm())
            found = float(error.norm())
        else:
            allowed = _ULPS * torch.finfo(wanted.dtype).eps * scale
            found = float(error.amax()) if wanted.numel() else 0.0
        # Written so that a NaN does not pass.
        if not found <= allowed:
            raise WrongResult(f"differs from the default by {found:.3e}, allowed {allowed:.3e}")


def failures() -> tuple[type[BaseException], ...]:
    """What trying a configuration may raise: what PyTorch and Triton refuse it with."""
    kinds: list[type[BaseException]] = [RuntimeError, ValueError]
    try:
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError
    except ImportError:
        return tuple(kinds)
    return (*kinds, CompilationError, OutOfResources, PTXASError)


def one_line(error: BaseException) -> str:
    """An error's kind and the beginning of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def check_device(device: torch.device, what: str) -> None:
    """Make sure that a device still answers after `what` failed on it.

    Raises:
        DeviceLost: if it does not.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise DeviceLost(f"{what}: the device is lost: {one_line(error)}") from None
