from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.fold_constants import LIMIT, fold_constants
from heatsink.runtime.graph.weight import COMPUTED, Origin


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Embedding(9, 4)
        self.register_buffer("held", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self, x),)


def _count(x: Tensor, stop: int) -> Tensor:
    return torch.arange(stop, device=x.device)


def _folded(graph: Graph) -> Graph:
    return run_passes(graph, [drop_noop_nodes, fold_constants, remove_dead_code])


def _targets(graph: Graph) -> set[str]:
    return {str(n.target).split(".")[1] for n in graph.nodes if n.op == "call_function"}


FOLDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sinusoids": lambda net, x: (
        x * torch.exp(torch.arange(4, dtype=torch.float32, device=x.device) * -0.7)
    ),
    "a mask": lambda net, x: x * (_count(x, 4)[:, None] >= _count(x, 4)[None]).float()[2],
    "a computed buffer": lambda net, x: x + torch.cos(net.held / 3),
}


@pytest.mark.parametrize("case", FOLDED)
def test_rule_1_what_no_input_reaches_is_computed_once(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(FOLDED[case]), 4)
    folded = _folded(graph)
    assert _targets(folded) <= {"mul", "add"}
    assert _targets(graph) > _targets(folded)
    (name,) = folded.weights
    assert folded.origins[name] == [Origin(name, None, COMPUTED)]
    agree(graph, folded, {"x": torch.randn(3, 4)})


def test_rule_1_values_are_rounded_once(capture_net: Callable[..., Graph]) -> None:
    folded = _folded(capture_net(Net(FOLDED["sinusoids"]), 4))
    (weight,) = folded.weights.values()
    exact = torch.exp(torch.arange(4, dtype=torch.float64) * -0.7)
    assert torch.equal(weight.load(), exact.float())
    assert torch.equal(weight.load(torch.float64), exact)


KEPT: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "a weight": ("sin", lambda net, x: x + torch.sin(net.table.weight[0])),
    "the batch": ("arange", lambda net, x: x + _count(x, x.shape[0])[:, None]),
    "random numbers": ("rand", lambda net, x: x + 0 * torch.rand(4, device=x.device)),
    "a large result": ("arange", lambda net, x: x + _count(x, LIMIT + 1)[: x.shape[0], None]),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_may_vary_stays(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    operation, function = KEPT[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), 4)
    folded = _folded(graph)
    assert operation in _targets(folded)
    assert not any(name.startswith(COMPUTED) for name in folded.weights)
    agree(graph, folded, {"x": torch.randn(3, 4)})


def test_rule_2_a_table_read_in_order_is_its_first_rows(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(lambda net, x: x + net.table(_count(x, 6)[None])), 6, 4)
    folded = _folded(graph)
    assert "embedding" not in _targets(folded)
    assert list(folded.origins.values()) == [[Origin("table.weight", ((0, 6),))]]
    agree(graph, folded, {"x": torch.randn(3, 6, 4)})


def test_rule_2_another_order_or_another_user_stays(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    cases: list[Callable[[Any, Tensor], Tensor]] = [
        lambda net, x: x + net.table((5 - _count(x, 6))[None]),
        lambda net, x: x + net.table(_count(x, 6)[None]) + net.table.weight[0],
    ]
    for function in cases:
        graph = capture_net(Net(function), 6, 4)
        folded = _folded(graph)
        assert "embedding" in _targets(folded)
        assert Origin("table.weight") in folded.origins["table.weight"]
        agree(graph, folded, {"x": torch.randn(3, 6, 4)})
