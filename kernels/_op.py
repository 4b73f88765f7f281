"""What the tools (ahead-of-time compilation, tuning, benchmarks) know of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._config import Config, Key
from heatsink.kernels._launch import Kernel, Launch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One real use of an op.

    Attributes:
        name: such as `sd15-self-64-fp16`; unique for the op.
        make: the public function's keyword arguments on a device (`meta`: without values).
        timed: whether it is tuned and benchmarked; all are compiled ahead of time.
    """

    name: str
    make: Callable[[torch.device], Inputs]
    timed: bool = True


@dataclass(frozen=True)
class Op:
    """An op as the tools see it.

    Attributes:
        name: the public function's, and the op's in `torch.ops.heatsink`.
        public: the public function.
        kernels: every Triton kernel that it may launch.
        cases: its real uses, those of whole models among them; the first is what CI compiles, so
            it must reach every kernel together with those listed in `smoke`.
        key: per-row dimensions that its configuration depends on, from the inputs.
        plan: `(config, inputs) -> (outputs, launches)`; allocates outputs and scratch.
        space: configurations worth trying, for a key and an architecture.
        smoke: names of the cases that together reach every kernel.
        changes: the argument that the public function changes instead of returning something, or
            empty; `plan` then works on a copy of it.
        outputs: what a call gave, from the arguments and what the public function returned; of an
            op whose results do not depend on what was there, so that no copy is needed.
    """

    name: str
    public: Callable[..., Any]
    kernels: tuple[Kernel, ...]
    cases: tuple[Case, ...]
    key: Callable[..., Key]
    plan: Callable[..., tuple[Any, list[Launch]]]
    space: Callable[[Key, int], list[Config]]
    smoke: tuple[str, ...] = ()
    outputs: Callable[[Inputs, Any], Any] = lambda inputs, result: result
    changes: str = ""

    def prepare(self, inputs: Inputs) -> Callable[[], Any]:
        """A call of the public function that gives its outputs.

        What it changes is a copy, made here: the first call gives the result, later ones go on from
        it and take the same time.
        """
        if not self.changes:
            return lambda: self.outputs(inputs, self.public(**inputs))
        own = {**inputs, self.changes: inputs[self.changes].clone()}

        def call() -> Tensor:
            self.public(**own)
            changed: Tensor = own[self.changes]
            return changed

        return call


def normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """Unit normal values of a fixed seed; without values on the meta device."""
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
