"""What an op is compared with: variants, and what its work costs at the least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._op import Case, Inputs
from heatsink.kernels.tuning_gate import tensors


def same(outputs: Any) -> Any:
    """The outputs as they are."""
    return outputs


@dataclass(frozen=True)
class Variant:
    """One way to compute what an op computes.

    Attributes:
        name: for tables.
        prepare: from the op's inputs the call that is timed; what a user would do once (another
            memory layout, compiling) is done here.
        view: the outputs in the op's layout, for the check; not timed.
        scope: entered around calls, outside what is timed.
        tolerance: of the relative error in the 2-norm, where it computes with fewer bits than its
            inputs have; 0 where the house's budget holds.
        comparable: False where the values are other ones by design, as a generator's of its own.
    """

    name: str
    prepare: Callable[[Inputs], Callable[[], Any]]
    view: Callable[[Any], Any] = same
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    tolerance: float = 0.0
    comparable: bool = True


@dataclass(frozen=True)
class LeftOut:
    """A variant that can't be had here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Cost:
    """The least that an op's result takes, whoever computes it.

    Attributes:
        bytes: every input read once and every output written once.
        flops: additions and multiplications of matrix products, by the dtype that they are in:
            `fp16`, `bf16`, `fp32`, `fp8` or `int8`.
        exponentials: calls of exp.
    """

    bytes: int
    flops: Mapping[str, int] = field(default_factory=dict)
    exponentials: int = 0


def compulsory_bytes(inputs: Inputs, outputs: Any) -> int:
    """Bytes of every tensor among the inputs, read once, and of every output, written once."""
    read = sum(_bytes(x) for x in inputs.values() if isinstance(x, Tensor))
    return read + sum(_bytes(out) for out in tensors(outputs))


def _bytes(x: Tensor) -> int:
    # What is broadcast by a stride of 0 is there once.
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * x.element_size()


def memory_cost(inputs: Inputs, outputs: Any) -> Cost:
    """The cost of an op that does little but read and write."""
    return Cost(compulsory_bytes(inputs, outputs))


def to_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating-point tensor in float64."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


@dataclass(frozen=True)
class Family:
    """What one op is measured against.

    Attributes:
        eager: the op in plain PyTorch, with the public function's arguments, in the inputs' dtype.
            With float64 inputs it is the reference of the check.
        others: further variants, from the inputs; called after `eager` was found to work.
        cost: from inputs and outputs.
        bundled: cases at the bundled model's shapes, for the CPU, beside those that the op names.
        exact: the reference from float64 inputs, where it is not `eager`.
        widen: the inputs of the reference; as they are where they stand for bits, not for values.
        tolerance: the op's own, as a variant's, from the inputs.
    """

    eager: Callable[..., Any]
    others: Callable[[Inputs], Sequence[Variant | LeftOut]] = lambda inputs: ()
    cost: Callable[[Inputs, Any], Cost] = memory_cost
    bundled: tuple[Case, ...] = ()
    exact: Callable[..., Any] | None = None
    widen: Callable[[Inputs], Inputs] = to_float64
    tolerance: Callable[[Inputs], float] = lambda inputs: 0.0

    def reference(self, inputs: Inputs) -> list[Tensor]:
        """The outputs in float64."""
        compute = self.exact or self.eager
        return tensors(compute(**self.widen(inputs)))


def eager_variant(name: str, eager: Callable[..., Any]) -> Variant:
    """`eager` on the inputs as they are."""
    return Variant(name, lambda inputs: lambda: eager(**inputs))


def compiled_variant(
    name: str,
    eager: Callable[..., Any],
    change: Callable[[Inputs], Inputs] = same,
) -> Variant:
    """`torch.compile` of `eager` for exactly these shapes, compiled before anything is timed."""

    def prepare(inputs: Inputs) -> Callable[[], Any]:
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        changed = change(inputs)
        return lambda: compiled(**changed)

    return Variant(name, prepare)
