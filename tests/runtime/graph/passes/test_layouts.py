from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.epilogues import fuse_epilogues
from heatsink.runtime.graph.passes.layouts import settle_layouts
from heatsink.runtime.graph.passes.lower_products import lower_products
from heatsink.runtime.graph.passes.residual_tokens import add_residuals_to_tokens

Function = Callable[[Any, Tensor], Tensor]
SHAPE = (4, 3, 5)


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.conv, self.last = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.linear, self.narrow = nn.Linear(6, 6), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self, x),)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], 15, 6)


def _image(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 3, 5, 6).permute(0, 3, 1, 2).contiguous()


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).reshape(x.shape[0], 6, 3, 5)


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


def _settle(graph: Graph) -> Graph:
    return run_passes(graph, [lower_products, settle_layouts])


def test_tokens_and_images_are_views_of_each_other(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(lambda n, x: n.last(_image(n.linear(_tokens(n.conv(x))))))
    graph = capture_net(net, *SHAPE)
    settled = _settle(graph)
    assert {"aten.contiguous", "aten.reshape"} <= set(_ops(graph))
    assert not {"aten.contiguous", "aten.reshape", "aten.clone"} & set(_ops(settled))
    inputs = {"x": torch.randn(3, *SHAPE)}
    assert settled.run(inputs)["y"].shape == (3, 6, 3, 5)
    agree(graph, settled, inputs)


MATCHED: dict[str, tuple[dict[str, int], Function]] = {
    "rule 1: contiguous": ({}, lambda n, x: torch.sin(x.transpose(1, 2).contiguous())),
    "rule 1: clone": ({}, lambda n, x: torch.sin(x.clone())),
    "rule 2: undone": ({"transpose": 0}, lambda n, x: x.transpose(1, 2).transpose(2, 1) + 1),
    "rule 2: by two permutations": (
        {"permute": 0},
        lambda n, x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2) + 1,
    ),
    "rule 2: joined": (
        {"permute": 1, "transpose": 0},
        lambda n, x: x.transpose(1, 2).permute(0, 3, 1, 2) + 1,
    ),
    "rule 3: reshape": ({"view": 1}, lambda n, x: torch.sin(x.reshape(-1, 4, 15))),
    "rule 3: flatten": ({"view": 1}, lambda n, x: torch.sin(x.flatten(2))),
}


@pytest.mark.parametrize("case", MATCHED)
def test_copies_for_layouts_go(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    counts, function = MATCHED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), *SHAPE)
    settled = _settle(graph)
    found = _ops(settled)
    assert {name: found[f"aten.{name}"] for name in counts} == counts
    assert not {"aten.contiguous", "aten.reshape", "aten.clone", "aten.flatten"} & set(found)
    agree(graph, settled, {"x": torch.randn(3, *SHAPE)})


def test_a_reshape_that_copies_stays(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(lambda n, x: torch.sin(x.transpose(1, 2).contiguous().view(x.shape[0], -1)))
    graph = capture_net(net, *SHAPE)
    settled = _settle(graph)
    # What was a copy and a view of it is one copy.
    assert (_ops(settled)["aten.reshape"], _ops(settled)["aten.view"]) == (1, 0)
    agree(graph, settled, {"x": torch.randn(3, *SHAPE)})


def test_rule_4_an_empty_batch_can_be_viewed(capture_net: Callable[..., Graph]) -> None:
    net = Net(lambda n, x: torch.sin(x.view(x.shape[0], -1, 5)))
    graph = capture_net(net, *SHAPE)
    with pytest.raises(RuntimeError, match="0 elements"):
        graph.run({"x": torch.zeros(0, *SHAPE)})
    assert _settle(graph).run({"x": torch.zeros(0, *SHAPE)})["y"].shape == (0, 12, 5)


def test_a_graph_that_writes_keeps_its_copies(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(lambda n, x: torch.sin(x.clone())), *SHAPE)
    (clone,) = (n for n in graph.nodes if operator(n) == "aten.clone")
    with graph.module.graph.inserting_after(clone):
        write = graph.module.graph.call_function(torch.ops.aten.add_.Scalar, (clone, 1.0))
    write.meta = dict(clone.meta)
    _, changed = settle_layouts(graph)
    assert not changed


RESIDUALS: dict[str, Function] = {
    "view and permute": lambda n, x: (h := n.conv(x)) + _image(n.linear(_tokens(h))),
    "transpose and view": lambda n, x: _transposed(n.linear(_tokens(h := n.conv(x)))) + h,
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_a_residual_of_an_image_is_added_to_its_tokens(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(RESIDUALS[case]), *SHAPE)
    moved = run_passes(_settle(graph), [add_residuals_to_tokens])
    (add,) = (n for n in moved.nodes if operator(n) == "aten.add")
    assert add.meta["val"].shape[1:] == (15, 6)
    fused = run_passes(moved, [fuse_epilogues])
    assert _ops(fused)["aten.add"] == 0
    (linear,) = (n for n in fused.nodes if operator(n) == "heatsink.linear")
    assert argument(linear, "residual") is not None
    assert fused.output_nodes()[0].meta["val"].shape[1:] == (6, 3, 5)
    agree(graph, fused, {"x": torch.randn(3, *SHAPE)})


STAY: dict[str, Function] = {
    "a residual that would be copied": lambda n, x: (
        _image(n.linear(_tokens(n.conv(x)))) + torch.sin(x.repeat(1, 2, 1, 1)[:, :6].contiguous())
    ),
    "another user of the image": lambda n, x: (
        (h := n.conv(x)) * (y := _image(n.linear(_tokens(h)))) + (h + y)
    ),
    "another order": lambda n, x: (
        (h := n.conv(x)) + n.linear(_tokens(h)).view(x.shape[0], 5, 3, 6).permute(0, 3, 2, 1)
    ),
    "the same image": lambda n, x: (y := _image(n.linear(_tokens(n.conv(x))))) + y,
    "no linear layer": lambda n, x: (h := n.conv(x)) + _image(torch.sin(_tokens(h))),
}


@pytest.mark.parametrize("case", STAY)
def test_other_additions_stay(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(STAY[case]), *SHAPE)
    settled = _settle(graph)
    edited, changed = add_residuals_to_tokens(settled.copy())
    assert not changed
    agree(graph, edited, {"x": torch.randn(3, *SHAPE)})
