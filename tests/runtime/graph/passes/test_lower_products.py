from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.lower_products import lower_products


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x),)


LOWERED: dict[str, tuple[str, tuple[int, ...], Callable[[], nn.Module]]] = {
    "rule 1: rows": ("linear", (4,), lambda: nn.Linear(4, 3)),
    "rule 1: tokens": ("linear", (5, 4), lambda: nn.Linear(4, 3, bias=False)),
    "rule 2: three by three": ("conv2d", (4, 5, 6), lambda: nn.Conv2d(4, 3, 3, padding=1)),
    "rule 2: a stride": ("conv2d", (4, 5, 6), lambda: nn.Conv2d(4, 3, 3, 2, 1, bias=False)),
    "rule 2: one by one": ("conv2d", (4, 5, 6), lambda: nn.Conv2d(4, 3, 1)),
    "rule 2: viewed after": (
        "conv2d",
        (4, 5, 6),
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), nn.Flatten()),
    ),
}
KEPT: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "groups": ((4, 5, 6), lambda: nn.Conv2d(4, 4, 3, groups=2)),
    "dilation": ((4, 5, 6), lambda: nn.Conv2d(4, 3, 2, dilation=2)),
    "two strides": ((4, 5, 6), lambda: nn.Conv2d(4, 3, 3, stride=(1, 2))),
    "two paddings": ((4, 5, 6), lambda: nn.Conv2d(4, 3, 3, padding=(1, 0))),
    "a named padding": ((4, 5, 6), lambda: nn.Conv2d(4, 3, 3, padding="same")),
    "one dimension": ((4, 6), lambda: nn.Conv1d(4, 3, 3)),
    "doubles": ((4,), lambda: nn.Sequential(_Double(), nn.Linear(4, 3).double())),
}


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("case", LOWERED)
def test_products_are_lowered(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    name, shape, make = LOWERED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(make()), *shape)
    lowered = run_passes(graph, [lower_products])
    (node,) = (n for n in lowered.nodes if operator(n) == f"heatsink.{name}")
    assert argument(node, "activation") == ""
    assert argument(node, "residual") is argument(node, "sample_add") is None
    if name == "conv2d":
        assert node.meta["val"].stride(1) == 1
    agree(graph, lowered, {"x": torch.randn(3, *shape)})


@pytest.mark.parametrize("case", KEPT)
def test_what_the_ops_lack_stays(case: str, capture_net: Callable[..., Graph]) -> None:
    shape, make = KEPT[case]
    graph = capture_net(Net(make()), *shape)
    assert any(operator(n) in {"aten.conv1d", "aten.conv2d", "aten.linear"} for n in graph.nodes)
    _, changed = lower_products(graph)
    assert not changed
