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
from heatsink.runtime.graph.passes.fold_inputs import fold_inputs
from heatsink.runtime.graph.passes.fuse_group_norm import fuse_group_norm
from heatsink.runtime.graph.passes.lower_products import lower_products
from heatsink.runtime.graph.weight import Origin

Function = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Convolutions of 8 channels and norms of them, to see 6 and 2 channels of the input joined."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.conv, self.short = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.norm, self.coarse = nn.GroupNorm(4, 8), nn.GroupNorm(2, 8)
        with torch.no_grad():
            for norm in (self.norm, self.coarse):
                norm.weight.add_(torch.randn(8))
                norm.bias.add_(torch.randn(8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self, x),)


def _both(x: Tensor, dim: int = 1) -> Tensor:
    return torch.cat([torch.sin(x[:, :6]), torch.exp(x[:, 6:])], dim=dim)


def _up(x: Tensor, factor: float = 2.0, mode: str = "nearest") -> Tensor:
    return functional.interpolate(x, scale_factor=factor, mode=mode)


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


def _fold(graph: Graph) -> Graph:
    return run_passes(graph, [fuse_group_norm, lower_products, fold_inputs])


UPSAMPLED: dict[str, tuple[int, Function]] = {
    "by a factor": (1, lambda n, x: n.conv(_up(x))),
    "to a size": (1, lambda n, x: n.conv(functional.interpolate(x, size=(8, 10)))),
    "two users": (2, lambda n, x: n.conv(y := _up(x)) + n.short(y)),
}


@pytest.mark.parametrize("case", UPSAMPLED)
def test_rule_1_upsampling_goes_into_the_convolution(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    count, function = UPSAMPLED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), 8, 4, 5)
    folded = _fold(graph)
    assert _ops(graph)["aten.upsample_nearest2d"] == 1
    assert _ops(folded)["aten.upsample_nearest2d"] == 0
    convs = [n for n in folded.nodes if operator(n) == "heatsink.conv2d"]
    assert [argument(n, "upsample") for n in convs] == [2] * count
    agree(graph, folded, {"x": torch.randn(3, 8, 4, 5)})


JOINED: dict[str, tuple[int, Function]] = {
    "rule 2: one convolution": (0, lambda n, x: n.conv(_both(x))),
    "rule 2: two": (0, lambda n, x: n.conv(y := _both(x)) + n.short(y)),
    "rule 3: a norm": (2, lambda n, x: n.conv(n.norm(_both(x)))),
    "rules 2 and 3": (
        2,
        lambda n, x: n.conv(functional.silu(n.norm(y := _both(x)))) + n.short(y),
    ),
}


@pytest.mark.parametrize("case", JOINED)
def test_concatenations_go_into_their_users(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    norms, function = JOINED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), 8, 4, 5)
    folded = _fold(graph)
    assert _ops(graph)["aten.cat"] == 1
    assert _ops(folded)["aten.cat"] == 0
    assert _ops(folded)["heatsink.group_norm_silu"] == norms
    for conv in (n for n in folded.nodes if operator(n) == "heatsink.conv2d"):
        assert argument(conv, "x2") is not None
    if norms:
        halves = [n for n in folded.nodes if operator(n) == "heatsink.group_norm_silu"]
        assert [argument(n, "groups") for n in halves] == [3, 1]
        names = [argument(n, "weight").meta["heatsink_weight"] for n in halves]
        rows = [[Origin("norm.weight", (span,))] for span in ((0, 6), (6, 8))]
        assert [folded.origins[name] for name in names] == rows
        assert "norm.weight" not in folded.weights
    agree(graph, folded, {"x": torch.randn(3, 8, 4, 5)})


KEPT: dict[str, Function] = {
    "rule 1: another factor": lambda n, x: n.conv(_up(x, 3.0)),
    "rule 1: another mode": lambda n, x: n.conv(_up(x, mode="bilinear")),
    "rule 1: another user": lambda n, x: n.conv(y := _up(x)) + torch.tanh(y)[:, :5],
    "rule 2: another axis": lambda n, x: n.conv(torch.cat([torch.sin(x), x], dim=2)),
    "rule 2: three": lambda n, x: n.conv(torch.cat([torch.sin(x[:, :3]), x[:, 3:6], x[:, 6:]], 1)),
    "rule 2: another user": lambda n, x: n.conv(y := _both(x)) + torch.tanh(y)[:, :5],
    "rule 3: a seam within a group": lambda n, x: n.conv(n.coarse(_both(x))) + n.short(x),
    "rule 3: a norm with another user": lambda n, x: n.conv(y := n.norm(_both(x))) + y[:, :5],
    "rule 3: a norm of no convolution": lambda n, x: n.norm(_both(x)),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_must_be_made_anyhow_stays(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = run_passes(capture_net(Net(KEPT[case]), 8, 4, 5), [fuse_group_norm, lower_products])
    edited, changed = fold_inputs(graph.copy())
    assert not changed
    agree(graph, edited, {"x": torch.randn(3, 8, 4, 5)})
