from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import PATH_KEY, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.flat_sums import flatten_sums


class Images(nn.Module):
    def __init__(self, added: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.added = added

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(x)
        if self.added == "a convolution":
            return (x + y,)
        if self.added == "something of one position":
            return (y + x[:, :, :1, :1],)
        return (torch.relu(y) + x,)


class Tokens(nn.Module):
    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.normed = nn.Linear(4, 4), nn.LayerNorm(4), normed

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        total = x + self.linear(x)
        return (self.norm(total) if self.normed else self.norm(total) + total,)


@pytest.mark.parametrize("net", [Images("a convolution"), Tokens(True)], ids=["rule 1", "rule 2"])
def test_a_sum_that_would_be_fused_is_flattened(
    net: nn.Module, capture_net: Callable[..., Graph], seed: int
) -> None:
    shape = (4, 5, 3) if isinstance(net, Images) else (6, 4)
    graph = capture_net(net, *shape)
    flat = run_passes(graph, [flatten_sums])
    (node,) = (n for n in flat.nodes if operator(n) == "aten.add")
    assert node.meta["val"].dim() == 2
    (old,) = (n for n in graph.nodes if operator(n) == "aten.add")
    assert node.meta[PATH_KEY] == old.meta[PATH_KEY]
    assert flat.origins == graph.origins
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(3, *shape)}
    assert flat.run(inputs)["y"].equal(graph.run(inputs)["y"])
    _, changed = flatten_sums(flat)
    assert not changed


@pytest.mark.parametrize(
    "net",
    [Images("something of one position"), Images("no convolution"), Tokens(False)],
    ids=["broadcast", "no convolution", "used elsewhere"],
)
def test_other_sums_stay(net: nn.Module, capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(net, *((4, 5, 3) if isinstance(net, Images) else (6, 4)))
    before = str(graph.module.graph)
    _, changed = flatten_sums(graph)
    assert not changed
    assert str(graph.module.graph) == before
