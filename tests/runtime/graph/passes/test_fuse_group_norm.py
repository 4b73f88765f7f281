from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.fuse_group_norm import fuse_group_norm


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor], affine: bool = True) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.GroupNorm(4, 8, eps=1e-3, affine=affine)
        if affine:
            with torch.no_grad():
                self.norm.weight.add_(torch.randn(8))
                self.norm.bias.add_(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self.norm, x),)


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


FUSED: dict[str, tuple[bool, tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "rule 1: alone": (False, (8, 3, 5), lambda norm, x: norm(x)),
    "rule 1: of tokens": (False, (8, 6), lambda norm, x: norm(x).transpose(1, 2)),
    "rule 1: silu of two": (False, (8, 3, 5), lambda norm, x: (y := norm(x)) + functional.silu(y)),
    "rule 1: another activation": (False, (8, 3, 5), lambda norm, x: torch.tanh(norm(x))),
    "rule 2: silu": (True, (8, 3, 5), lambda norm, x: functional.silu(norm(x))),
    "rule 2: viewed after": (
        True,
        (8, 3, 5),
        lambda norm, x: functional.silu(norm(x)).view(-1, 120),
    ),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", FUSED)
def test_norms_are_found(
    case: str,
    affine: bool,
    capture_net: Callable[..., Graph],
    agree: Callable[..., None],
    seed: int,
) -> None:
    silu, shape, function = FUSED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function, affine), *shape)
    fused = run_passes(graph, [fuse_group_norm])
    (node,) = (n for n in fused.nodes if operator(n) == "heatsink.group_norm_silu")
    assert argument(node, "silu") is silu
    assert argument(node, "eps") == 1e-3
    assert _ops(fused)["aten.group_norm"] == 0
    assert _ops(fused)["aten.silu"] == _ops(graph)["aten.silu"] - silu
    value = node.meta["val"]
    assert value.stride(1) == 1
    agree(graph, fused, {"x": 3 + torch.randn(3, *shape)})


def test_a_norm_without_pixels_stays(capture_net: Callable[..., Graph]) -> None:
    _, changed = fuse_group_norm(capture_net(Net(lambda norm, x: norm(x)), 8))
    assert not changed


def test_layouts_stay_where_something_reads_strides(capture_net: Callable[..., Graph]) -> None:
    net = Net(lambda norm, x: norm(x).as_strided((2, 8), (120, 1)))
    _, changed = fuse_group_norm(capture_net(net, 8, 3, 5))
    assert not changed
