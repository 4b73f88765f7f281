from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.merge_equal import merge_equal_nodes


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(x),)


def _ops(graph: Graph) -> Counter[str]:
    targets = (str(n.target) for n in graph.nodes if n.op == "call_function")
    return Counter(t.split(".")[1] for t in targets if t.startswith("aten."))


def test_rule_1_equal_operations_become_one_and_chains_of_them(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(lambda x: torch.sin(functional.silu(x)) + 2 * torch.sin(functional.silu(x)))
    graph = capture_net(net, 4)
    merged = run_passes(graph, [merge_equal_nodes])
    assert _ops(graph)["silu"] == _ops(graph)["sin"] == 2
    assert _ops(merged)["silu"] == _ops(merged)["sin"] == 1
    agree(graph, merged, {"x": torch.randn(3, 4)})


KEPT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "other arguments": ("mul", lambda x: x * 2 + x * 3),
    "another type of number": ("div", lambda x: (x / 1) + (x / True)),
    "another axis": ("softmax", lambda x: x.softmax(1) + x.softmax(2)),
    "random numbers": ("rand_like", lambda x: x + 0 * (torch.rand_like(x) - torch.rand_like(x))),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_differs_stays(case: str, capture_net: Callable[..., Graph]) -> None:
    operation, function = KEPT[case]
    graph = capture_net(Net(function), 4, 5)
    merged = run_passes(graph, [merge_equal_nodes])
    assert _ops(merged)[operation] == _ops(graph)[operation] == 2


def test_a_graph_that_writes_stays(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(lambda x: torch.sin(x) * torch.sin(x)), 4)
    first = next(n for n in graph.nodes if "sin" in str(n.target))
    with graph.module.graph.inserting_after(first):
        write = graph.module.graph.call_function(torch.ops.aten.add_.Scalar, (first, 1.0))
    write.meta = dict(first.meta)
    _, changed = merge_equal_nodes(graph)
    assert not changed
