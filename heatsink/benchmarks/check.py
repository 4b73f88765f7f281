"""Whether a variant computes the right thing, before its time counts.

The house's budget: error <= 2 x (error of the plain expression in the same dtype + eps x
max|reference|), everywhere, against float64. What computes with fewer bits than its inputs have is
held to a relative error in the 2-norm instead. Integers must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatsink.benchmarks.family import Family, Variant
from heatsink.kernels._op import Inputs
from heatsink.kernels.errors import KernelError
from heatsink.kernels.tuning_gate import failures, tensors


class Disagrees(KernelError):
    """A variant's result is not the reference's."""


@dataclass(frozen=True)
class Ready:
    """A variant that was checked and can be timed.

    Attributes:
        variant: what it is.
        call: runs it.
        max_error: the largest difference from float64; None where values differ by design.
        relative_error: in the 2-norm, the largest over the outputs; None likewise.
    """

    variant: Variant
    call: Callable[[], Any]
    max_error: float | None
    relative_error: float | None


@dataclass(frozen=True)
class Reference:
    """The outputs in float64, and the largest error that each may have."""

    exact: list[Tensor]
    allowed: list[float]

    @classmethod
    def of(cls, family: Family, inputs: Inputs) -> Reference:
        """From a family's reference and its plain expression."""
        exact = family.reference(inputs)
        plain = tensors(family.eager(**inputs))
        allowed = [
            2 * (_max_error(one, wanted) + _eps(one) * _largest(wanted))
            for one, wanted in zip(plain, exact, strict=True)
        ]
        return cls(exact, allowed)

    def check(self, outputs: Sequence[Tensor], tolerance: float = 0.0) -> tuple[float, float]:
        """The largest absolute and relative error.

        Args:
            outputs: a variant's, in the op's layout.
            tolerance: of the relative error; 0 for the house's budget.

        Raises:
            Disagrees: if one is beyond what is allowed, or a shape or an integer is another.
        """
        largest = relative = 0.0
        for out, wanted, allowed in zip(outputs, self.exact, self.allowed, strict=True):
            if out.shape != wanted.shape:
                raise Disagrees(f"shape {tuple(out.shape)}, expected {tuple(wanted.shape)}")
            if not out.is_floating_point():
                if not torch.equal(out, wanted):
                    raise Disagrees("other integers than the reference")
                continue
            error, share = _max_error(out, wanted), _relative_error(out, wanted)
            # Written so that a NaN does not pass.
            if tolerance and not share <= tolerance:
                raise Disagrees(f"relative error {share:.2e}, allowed {tolerance:.2e}")
            if not tolerance and not error <= allowed:
                raise Disagrees(f"error {error:.2e}, allowed {allowed:.2e}")
            largest, relative = max(largest, error), max(relative, share)
        return largest, relative


def make_ready(variant: Variant, inputs: Inputs, reference: Reference) -> Ready:
    """Prepare a variant, run it once and check what it gives.

    Raises:
        Disagrees: if the result is wrong; whatever the variant itself refuses with.
    """
    call = variant.prepare(inputs)
    with variant.scope():
        outputs = tensors(variant.view(call()))
    if not variant.comparable:
        return Ready(variant, call, None, None)
    return Ready(variant, call, *reference.check(outputs, variant.tolerance))


def refusals() -> tuple[type[BaseException], ...]:
    """What a library may say no with: that it is absent, or can't do this shape or dtype."""
    return (*failures(), TypeError, ImportError, AssertionError, AttributeError)


def _eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def _largest(x: Tensor) -> float:
    return float(x.double().abs().amax()) if x.numel() else 0.0


def _max_error(x: Tensor, wanted: Tensor) -> float:
    return _largest(x.double() - wanted.double())


def _relative_error(x: Tensor, wanted: Tensor) -> float:
    norm = float(wanted.double().norm())
    error = float((x.double() - wanted.double()).norm())
    return error / norm if norm else error
