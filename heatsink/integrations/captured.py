"""A library's module captured as a graph that reads the module's own weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec

Wrapper = Callable[[nn.Module], nn.Module]
"""Makes of a module one that takes its inputs in order and returns a tuple."""

# Times, sizes and tokens keep their dtype whatever the network computes in.
EXACT = {"input_ids": torch.int64, "timestep": torch.float32, "time_ids": torch.float32}


class Live(Mapping[str, Tensor]):
    """A module's parameters and buffers by name, each looked up when it is asked for.

    They may be moved or cast after a graph was captured.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], get: Callable[[str], Tensor]):
        self._module, self._names, self._get = module, dict.fromkeys(names), get

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def capture_original(
    original: Any,
    kind: str,
    wrapper: Wrapper,
    shapes: Mapping[str, tuple[int, ...]],
    outputs: Sequence[str],
    dtype: torch.dtype,
) -> Graph:
    """Capture what `wrapper` makes of a copy of `original` on meta; no weight is read.

    Args:
        original: the library's module.
        kind: the graph's name.
        wrapper: how its arguments are given.
        shapes: of the inputs by name, without the row.
        outputs: names of what is returned.
        dtype: what to compute in.

    Raises:
        NotBuilt: the network can't be captured.
    """
    parameters = [name for name, _ in original.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in original.named_buffers(remove_duplicate=False)]
    specs = {
        name: TensorSpec((BATCH, *shape), EXACT.get(name, dtype)) for name, shape in shapes.items()
    }
    return capture_module(
        kind,
        wrapper(on_meta(original, dtype)),
        Live(original, parameters, original.get_parameter),
        Live(original, buffers, original.get_buffer),
        specs,
        outputs,
        dtype=dtype,
    )


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on meta that computes in `dtype`; no weight is copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    made: nn.Module = copy.deepcopy(module, memo)
    # `nn.Module`'s own: the libraries' ask whether the module was loaded in another precision.
    return nn.Module.to(made, dtype=dtype)
