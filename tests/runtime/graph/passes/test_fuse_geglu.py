from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.fuse_geglu import fuse_geglu

Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(torch.sin(x)),)


def _two(x: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
    return x.chunk(2, dim=dim)


FUSED: dict[str, Function] = {
    "value first": lambda x: (h := _two(x))[0] * gelu(h[1]),
    "gate first": lambda x: gelu((h := _two(x, 2))[1]) * h[0],
    "split": lambda x: (h := torch.split(x, [4, 4], dim=-1))[0] * gelu(h[1]),
}
KEPT: dict[str, Function] = {
    "halves swapped": lambda x: (h := _two(x))[1] * gelu(h[0]),
    "another dimension": lambda x: (h := _two(x, 1))[0] * gelu(h[1]),
    "unequal parts": lambda x: (h := torch.split(x, [1, 7], dim=-1))[0] * gelu(h[1]),
    "four parts": lambda x: (h := x.chunk(4, dim=-1))[0] * gelu(h[1]),
    "by tanh": lambda x: (h := _two(x))[0] * gelu(h[1], approximate="tanh"),
    "another user of the gate": lambda x: (h := _two(x))[0] * gelu(h[1]) + h[1],
    "another user of the value": lambda x: (h := _two(x))[0] * gelu(h[1]) + h[0],
    "another user of the gelu": lambda x: (h := _two(x))[0] * (g := gelu(h[1])) + g,
    "halves of two inputs": lambda x: _two(x)[0] * gelu(_two(x + 1)[1]),
}


@pytest.mark.parametrize("case", FUSED)
def test_rule_1_halves_are_found(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(FUSED[case]), 6, 8)
    fused = run_passes(graph, [fuse_geglu])
    found = [operator(n) for n in fused.nodes if n.op == "call_function"]
    assert found == ["aten.sin", "heatsink.geglu"]
    agree(graph, fused, {"x": torch.randn(3, 6, 8)})


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_geglu_stays(case: str, capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(KEPT[case]), 6, 8)
    assert any(operator(n) == "aten.gelu" for n in graph.nodes)
    _, changed = fuse_geglu(graph)
    assert not changed
